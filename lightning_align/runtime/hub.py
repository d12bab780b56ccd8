"""Whether the Hugging Face hub can be reached."""

from functools import cache

SECONDS = 5.0


@cache
def out_of_reach(name: str, revision: str | None = None) -> bool:
    """Return whether the hub gives no answer about a repository, so that only downloaded files can be used.

    The hub is asked once, with a short timeout. Without a network, transformers would retry for half a minute per file.

    Args:
        name: The name of a model's repository.
        revision: A branch, tag or commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except HfHubHTTPError:  # an answer: the repository does not exist or is private
        return False
    except Exception:  # no network, or offline mode: the client library has many kinds of errors here
        return True
    return False
