"""How responses end, and which tokens they may contain. Everything that generates or trains on responses uses one `Ends`.

    ends = Ends.of(tokenizer=tokenizer, model=model, config=config)
    answers = generate(model, prompts, config, ends=ends)

Within a module of this package, use ``module.ends()``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_align.data.tokenizer.protocol import all_ends
from lightning_align.generation.stop import StopTexts
from lightning_align.generation.support import Support
from lightning_align.models.language_model import declared_ends


class EndSettings(Protocol):
    """The settings that end responses. `GenerationConfig` has them."""

    stop: Sequence[str]
    eos_token: Any


@dataclass(frozen=True)
class Ends:
    """How a response ends: at end-of-sequence ids and stop texts. It also knows which ids exist.

    Args:
        ids: The ids that end a response, without duplicates. The first one is the tokenizer's own.
        stop: The texts that end a response. None if there are none.
        support: The ids that may be drawn.
    """

    ids: tuple[int, ...] = ()
    stop: StopTexts | None = None
    support: Support = field(default_factory=Support)

    @classmethod
    def of(
        cls,
        *,
        tokenizer: Any = None,
        model: nn.Module | None = None,
        config: EndSettings | None = None,
        default: EndSettings | None = None,
    ) -> "Ends":
        """Collect the ends from everything that knows one.

        The end-of-sequence ids come from the tokenizer (its own and the one with which its chat template ends a turn), the
        model (a model of transformers declares them in its generation settings) and the user (`eos_token`).

        Args:
            tokenizer: The tokenizer. Without one, every id exists, and `eos_token` must be ids.
            model: The model that generates.
            config: The generation settings.
            default: The settings whose `stop` and `eos_token` apply where `config` has none, such as those of the module.

        Raises:
            ValueError: If a stop text or end token does not exist in the tokenizer, or needs one and there is none.
        """
        support = Support.of(tokenizer)
        settings = [given for given in (config, default) if given is not None]
        eos_token = next((given.eos_token for given in settings if given.eos_token is not None), None)
        ends = end_ids(tokenizer=tokenizer, model=model, eos_token=eos_token)
        texts: Sequence[str] = next((given.stop for given in settings if given.stop), ())
        if texts and tokenizer is None:
            raise ValueError(
                f"`stop` is {list(texts)}, which needs a tokenizer. Give the data a `tokenizer`, or remove `stop`."
            )
        if not ends and not texts:
            say_once(
                "No token is known to end a response, so only length limits end responses. Use data with a `tokenizer`, or set "
                "`eos_token` of `generation` to its id."
            )
        return cls(ends, StopTexts.of(texts, tokenizer, ends=ends, support=support) if texts else None, support)

    @classmethod
    def exactly(
        cls,
        eos_id: int | Sequence[int] | None,
        *,
        config: EndSettings,
        model: nn.Module | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> "Ends":
        """Build ends of ids and of a function from ids to text, without a tokenizer.

        Args:
            eos_id: One id, several ids, or None.
            config: The generation settings.
            model: The model that generates. The ids that it declares are added unless `eos_id` is None.
            decode: A function from ids to text. Required with `stop`.

        Raises:
            ValueError: If `stop` is set without `decode`, or `eos_token` is a text.
        """
        if config.stop and decode is None:
            raise ValueError(
                f"`stop` is {list(config.stop)}, which needs a tokenizer. Pass `ends` or `decode`, or remove `stop`."
            )
        ids = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
        if ids and model is not None:
            ids += declared_ends(model)
        ids += _given(config.eos_token, None, Support())
        stop = StopTexts(config.stop, decode) if config.stop and decode is not None else None
        return cls(tuple(dict.fromkeys(ids)), stop)

    @property
    def own(self) -> int | None:
        """The tokenizer's end-of-sequence id, or the first of all. None if no id ends a response."""
        return self.ids[0] if self.ids else None

    def described(self) -> dict[str, Any]:
        """Describe the ends as JSON: ``eos_token_id`` (a list), ``stop`` (a list), ``vocab_size`` and ``holes``."""
        return {
            "eos_token_id": list(self.ids),
            "stop": [] if self.stop is None else list(self.stop.texts),
            "vocab_size": self.support.size,
            "holes": sorted(self.support.holes),
        }


def end_ids(*, tokenizer: Any = None, model: nn.Module | None = None, eos_token: Any = None) -> tuple[int, ...]:
    """Collect the ids that end a response, the tokenizer's own first. See `Ends.of`."""
    support = Support.of(tokenizer)
    ids = [] if tokenizer is None else list(all_ends(tokenizer))
    if model is not None:
        declared = declared_ends(model)
        if missing := support.missing(declared):
            say_once(f"The model declares the end-of-sequence ids {missing}, which the tokenizer lacks. They are not used.")
        ids += [token for token in declared if token in support]
        specials = getattr(tokenizer, "special_ids", None)
        for token in () if specials is None else sorted({*declared} - specials - {*missing, *all_ends(tokenizer)}):
            text = tokenizer.decode([token], skip_special=False)
            say_once(f"The model declares the end-of-sequence id {token}, in the tokenizer the ordinary token {text!r}.")
    return tuple(dict.fromkeys([*ids, *_given(eos_token, tokenizer, support)]))


def _given(eos_token: Any, tokenizer: Any, support: Support) -> list[int]:
    """Return the ids of the end tokens that the user gave as texts or ids."""
    tokens = [] if eos_token is None else [eos_token] if isinstance(eos_token, (str, int)) else list(eos_token)
    ids: list[int] = []
    for token in tokens:
        found = token if isinstance(token, int) else None if tokenizer is None else token_id(tokenizer, token)
        if found is None or found not in support:
            why = "the tokenizer has no such token. Give another one"
            if tokenizer is None:
                why = "there is no tokenizer. Give its id"
            raise ValueError(f"`eos_token` must be a token of the tokenizer, but got {token!r}: {why}, or remove it.")
        ids.append(found)
    return ids


def token_id(tokenizer: Any, text: str) -> int | None:
    """Return the id of the token with this text, or None if there is none."""
    if hasattr(tokenizer, "token_id"):
        found: int | None = tokenizer.token_id(text)
        return found
    ids = tokenizer.encode_batch([text])[0].ids
    return int(ids[0]) if len(ids) == 1 and tokenizer.decode(ids, skip_special=False) == text else None


@cache
def say_once(message: str) -> None:
    """Log a message once per process."""
    rank_zero_info(message)
