"""Errors of libraries in a line that says what to do."""

import re


def advise(error: BaseException) -> str:
    """Return the message of a library's error, and what to do about it.

    Args:
        error: An error that a user can repair: a setting that Lightning refuses, a missing package, a full device.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        name = error.name or text
        return f"the package {name!r} is not installed ({text}). Install it, or choose a setting that does not need it."
    if type(error).__name__ == "OutOfMemoryError":
        wanted = re.search(r"Tried to allocate [\d.]+ \w+", text)
        return (
            f"the device is out of memory ({wanted[0] if wanted else text}). Lower --data.batch_size or --data.max_length, set "
            "--model.activation_checkpointing true, or train with --model.lora.rank 16 or --config trainer/fsdp2."
        )
    if "No supported gpu backend found" in text or re.search(r"accelerator.*(?:CUDA|GPU|MPS).*not available", text, re.I):
        return f"{text.rstrip('!.')}: torch finds no GPU here. Use --trainer.accelerator cpu. `lightning-align env` shows more."
    if "requested gpu" in text and "machine only has" in text:
        return f"{text} Set --trainer.devices to devices that exist: lightning-align env"
    return text
