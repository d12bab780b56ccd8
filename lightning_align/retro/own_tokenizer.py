"""The tokenizer that a retrieval database holds, so that it opens anywhere."""

import shutil
from pathlib import Path

from lightning_align.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, TransformersTokenizer, load_tokenizer
from lightning_align.retrieval.database import RetrievalDatabase
from lightning_align.runtime.files import publish_text, temporary_path


def keep_tokenizer(root: Path, tokenizer: Tokenizer) -> str | None:
    """Save a tokenizer in the folder of a database, once.

    Args:
        root: The folder of the database.
        tokenizer: The tokenizer.

    Returns:
        The name to load it by, relative to the folder. None for a class of another library, which has to be given again.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return "bytes"
    if not isinstance(tokenizer, FileTokenizer):
        return None
    of_transformers = isinstance(tokenizer, TransformersTokenizer)  # which is a FileTokenizer, too
    folder = root / f"tokenizer-{tokenizer.fingerprint[:16]}"
    _, mark, options = tokenizer.name.partition("?")
    name = folder.name if of_transformers else f"{folder.name}/tokenizer.json"
    if not (root / name).exists():  # a process that was killed can have made the folder alone
        if not isinstance(tokenizer, TransformersTokenizer):
            publish_text(folder / "tokenizer.json", tokenizer.text)
        else:
            temporary = temporary_path(folder)
            try:
                tokenizer.save(temporary, own_template=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return f"{name}{mark}{options}"


def database_tokenizer(database: RetrievalDatabase, given: str | Tokenizer | None) -> str | Tokenizer:
    """Return the tokenizer of a database.

    Args:
        database: The database.
        given: What the user gave, or None for the copy in the database.

    Returns:
        The given tokenizer, the copy, or the name that the build was given.

    Raises:
        ValueError: If the given tokenizer is another one, or the database has no copy and none is given.
    """
    head, expected = database.manifest, database.chunks.tokenizer_fingerprint
    if given is not None:
        found = load_tokenizer(given) if isinstance(given, str) else given
        if found.fingerprint != expected:
            raise ValueError(
                f"`tokenizer` must be the one that {database.folder} was built with, whose fingerprint is {expected}, but got "
                f"{given if isinstance(given, str) else type(given).__name__} with {found.fingerprint}. Leave it out to use "
                "the copy in the database."
            )
        return found
    if (own := head.get("tokenizer")) is not None:
        found = load_tokenizer(own if own == "bytes" else str(database.folder / own))
        if found.fingerprint != expected:
            raise ValueError(
                f"{database.folder / own}: the tokenizer in it is not the one that the chunks were made with. Its files were "
                "changed, or another version of its library reads them otherwise. Pass the right one as `tokenizer`."
            )
        return found
    if head["made_with"]["tokenizer"] is None:
        raise ValueError(
            f"{database.folder} was built with an object as the tokenizer, which cannot be loaded again. Pass an equal one as "
            "`tokenizer`."
        )
    return str(head["made_with"]["tokenizer"])
