"""Names on the Hugging Face hub: whether the hub can be asked at all."""

from functools import cache

SECONDS = 5.0


@cache
def out_of_reach(name: str, revision: str | None = None) -> bool:
    """Whether the hub gives no answer about a repository, so that only what was fetched before can be read.

    It is asked once, and shortly: without a network, transformers would try again for half a minute for every file.

    Args:
        name: of a model's repository.
        revision: branch, tag or commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except HfHubHTTPError:  # an answer: there is no such repository, or it is not for everybody
        return False
    except Exception:  # of the network, or that there shall be none: its kinds are those of the client library
        return True
    return False
