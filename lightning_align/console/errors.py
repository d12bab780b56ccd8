"""Errors of the parser in three lines: what is wrong with the nearest names, what is possible, and where the help is."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml

from lightning_align.console.configs import nearest, shipped
from lightning_align.console.names import ALIASES, classes, did_you_mean, near, parameters

WIDTH = 400
"""The largest number of characters of a line."""
PLAIN = {
    "NoneType": "null",
    "str": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
    "collections.abc.Iterable": "a list",
}
"""Types of Python in the words of YAML."""


def explain(message: str, *, command: str = "", options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Say in at most three lines what is wrong with a command line.

    Args:
        message: The message of jsonargparse.
        command: The command, such as ``fit``. Empty if it is not known.
        options: The names of the command's options, such as ``trainer.max_steps``.
        arguments: The command line.

    Returns:
        The lines. A message of an unknown kind is shortened to its innermost lines.
    """
    call = f"lightning-align {command}".strip()
    for kind in (
        _missing_config,
        _broken_config,
        _not_a_mapping,
        _help_of_a_part,
        _misspelt_class_key,
        _unknown_option,
        _unrecognized,
        _needs_arguments,
        _required,
        _no_class,
        _no_choice,
        _wrong_type,
    ):
        lines = kind(message, call, options, arguments)
        if lines:
            break
    else:
        lines = [*_innermost(message)[:2], f"Help: {call} --help"]
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in lines)


def unknown_command(name: str, commands: Sequence[str]) -> str:
    """Say that there is no such command, and which there are."""
    near = did_you_mean(name, commands)
    return f"no command {name!r}{near or '.'}\nCommands: {', '.join(commands)}\nHelp: lightning-align --help"


# -- kinds of errors. Each function returns the lines, or none if the message is of another kind.


def _missing_config(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"(?:File does not exist|Problems? (?:opening|reading)[^']*): '?([^'\n]+)'?", message)
    if not match or 'key "config"' not in message:
        return []
    path = match[1]
    # The parser completes the path, and people read the one that they gave.
    given = next((word.partition("=")[2] or word for word in arguments if word and path.endswith(f"/{word}")), path)
    given = next((word.split("=", 1)[1] for word in arguments if "=" in word and path.endswith(word.split("=", 1)[1])), given)
    local = get_close_matches(Path(given).name, [file.name for file in Path(given).parent.glob("*.y*ml")], n=1)
    others = [str(Path(given).parent / name) for name in local] + nearest(given)
    hint = f"; did you mean {' or '.join(map(repr, others[:2]))}?" if others else "."
    groups = ", ".join(dict.fromkeys(name.partition("/")[0] for name in shipped()))
    return [
        f"--config {given}: there is no such file, and no shipped configuration of this name{hint}",
        f"Shipped configurations ({groups}): lightning-align configs",
    ]


def _broken_config(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    if "Problems parsing config" not in message:
        return []
    for path in (Path(word.rpartition("=")[2]) for word in arguments):
        if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
            continue
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = "" if mark is None else f":{mark.line + 1}:{mark.column + 1}"
            line = "" if mark is None else path.read_text(encoding="utf-8", errors="replace").splitlines()[mark.line].strip()
            problem = getattr(error, "problem", None) or str(error)
            return [f"{path}{place} is not valid YAML: {problem}", *([f"The line is: {line}"] if line else [])]
    return []


def _not_a_mapping(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    if "Unexpected config" not in message and not re.search(r'key "config": Path is not a file', message):
        return []
    keys = "seed_everything, model, data, trainer and ckpt_path"
    for path in (Path(word.rpartition("=")[2]) for word in arguments):
        if path.is_dir():
            inside = sorted(file.name for file in path.glob("*.y*ml"))
            found = f" It has {', '.join(inside[:5])}." if inside else ""
            return [f"--config {path} is a folder, and must be a YAML file.{found}", "Shipped: lightning-align configs"]
        if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
            continue
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            what = "is empty" if content is None else f"holds a {type(content).__name__}"
            return [f"--config {path} {what}, and must be a mapping with keys such as {keys}."]
    return []


def _help_of_a_part(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"unrecognized arguments: --([\w.]+)\.help=?(\S*)", message)
    keys = _keys(message)
    if not match or not keys:
        return []
    outer = {"model": "DPOModule", "data": "DPODataModule"}.get(keys[0], "CLASS")
    example = f"{call} --{keys[0]} {outer} --{keys[0]}.{match[1]}.help {match[2]}".rstrip()
    return [f"--{keys[0]}.{match[1]}.help needs the class of --{keys[0]} before it.", f"Example: {example}"]


def _misspelt_class_key(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"Option '(\w+)[^']*' is not accepted", message)
    written = re.search(r"Given value: (?:\[.*)?\{[^\n]*", _block(message))
    if not match or not written or match[1] not in ("class", "cls", "name", "type", "classpath", "init_arg", "args", "kwargs"):
        return []
    right = "init_args" if "arg" in match[1] else "class_path"
    if right in written[0]:
        return []
    return [
        f"--{'.'.join(_keys(message))} has no key {match[1]!r}; did you mean {right!r}?",
        "A class is written as {class_path: NAME, init_args: {argument: value}}.",
        f"Help: {call} --help",
    ]


def _needs_arguments(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """An argument without a default of a class."""
    match = re.search(r"arguments are required: ([\w, ]+)", message)
    if not match:
        return []
    # The class is named after the arguments if it is a factory, and before them otherwise.
    if "callable class: the following" in message:
        found = re.findall(r"class_path'?[:=] ?'([^']+)'", message[match.end() :])[:1]
    else:
        found = re.findall(r"class_path '([^']+)'", message[: match.start()])[-1:]
    if not found:
        return []
    path = found[0] if "." in found[0] else classes().get(found[0], found[0])
    names = [name.strip() for name in match[1].split(",") if name.strip()]
    place = ".".join(_keys(message))
    given = " and ".join(f"--{place}.{name} VALUE" for name in names)
    return [
        f"{_short(path)} needs {' and '.join(map(repr, names))}: give {given}",
        f"Arguments of {_short(path)}: {', '.join(parameters(path))}",
        f"Help: {call} {_help_flag(message, path)}",
    ]


def _unknown_option(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"Option '([^']+)' is not accepted([^\n]*)", message)
    if not match:
        return []
    # The class is named after the option if it is a factory, and before it otherwise.
    after = re.findall(r"class_path='([^']+)'", match[2])
    before = re.findall(r"class_path '([^']+)'", message[: match.start()])
    path = (after or before[-1:] or [""])[0]
    if path.endswith(("LightningModule", "LightningDataModule", ".Callback")):
        key = (_keys(message) or ["model"])[0]
        example = {"model": "SFTModule", "data": "SFTDataModule"}.get(key, "CLASS")
        return [
            f"--{key}.{match[1]} needs a class: name it before, as in --{key} {example}, or give a --config first.",
            f"Help: {call} --help",
        ]
    known = parameters(path)
    other_name = next((name for name in ALIASES.get(match[1], ()) if name in known), None)
    hint = f"; did you mean {other_name!r}?" if other_name else did_you_mean(match[1], known) or "."
    if match[1] in ("lr", "learning_rate", "weight_decay") and "optimizer" in known:
        name = match[1].replace("learning_rate", "lr")
        hint = f"; it is set with --{(_keys(message) or ['model'])[0]}.optimizer AdamW --model.optimizer.{name} VALUE."
    lines = [f"{_short(path) or 'it'} has no argument {match[1]!r}{hint}"]
    if known:
        lines.append(f"Arguments of {_short(path)}: {', '.join(known)}")
    return [*lines, f"Help: {call} {_help_flag(message, path)}"]


def _unrecognized(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"unrecognized arguments: (\S+)|does not accept option '([^']+)'|No action for key \"([^\"]+)\"", message)
    if not match:
        return []
    given = next(part for part in match.groups() if part)
    name = given.lstrip("-").partition("=")[0]
    if match[1] and not given.startswith("-"):
        return [f"the argument {given!r} belongs to no option.", f"Options begin with --, as in {call} --config sft/jsonl"]
    if match[1] and f"-{name}" in [word.partition("=")[0] for word in arguments] and f"--{name}" not in " ".join(arguments):
        return [f"the option -{name} is written with two dashes: --{name}", f"Help: {call} --help"]
    head, _, rest = name.partition(".")
    groups = list(dict.fromkeys(option.partition(".")[0] for option in options))
    dashes = "--" if match[1] else ""
    wrong, known = (head, groups) if head not in groups and rest else (name, options)
    place = _place(name) if "model" in groups and head not in groups else None
    if place is not None:
        right = f"--{place}" if match[1] else place.replace("model.", "model.init_args.").replace("data.", "data.init_args.")
        hint = f"; did you mean {right!r}?"
    else:
        hint = did_you_mean(dashes + wrong, [dashes + other for other in known])
    return [f"{call} has no option {dashes + wrong!r}{hint or '.'}", f"Help: {call} --help"]


def _place(name: str) -> str | None:
    """Return the option that sets an argument of the module, the data or the Trainer, if the name is exactly one of them."""
    head, _, rest = name.partition(".")
    head = {"learning_rate": "lr", "epochs": "max_epochs", "steps": "max_steps"}.get(head, head)
    if head in ("lr", "weight_decay"):
        return f"model.optimizer.{head}"
    places = (
        ("model", "lightning_align.DPOModule"),
        ("data", "lightning_align.DPODataModule"),
        ("trainer", "lightning.Trainer"),
    )
    for group, path in places:
        if head in parameters(path):
            return f"{group}.{head}{'.' * bool(rest)}{rest}"
    return None


def _required(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    match = re.search(r"(?:arguments are required|[Kk]ey \"[\w.]+\" is required)[^:\n]*:? ?([^\n]*)", message)
    if not match:
        return []
    names = [name.strip().rpartition(".")[2] for name in match[1].split(",") if name.strip()]
    runs = call.rpartition(" ")[2] in ("fit", "validate", "test", "predict")
    if runs and {"model", "data"} & set(names):
        needed = " and ".join(f"--{name}" for name in sorted(names, reverse=True))
        return [
            f"{call} needs {needed}, which a configuration can give.",
            f"Example: {call} --config sft/jsonl --config model/palm_tiny --data.train rows.jsonl",
            "Configurations: lightning-align configs",
        ]
    return [f"{call} needs {', '.join(names) or 'an argument'}.", f"Help: {call} --help"]


def _no_class(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    block = _block(message)
    signs = r"Expected a dot import path string|No module named|has no attribute|cannot import name|Import path"
    others = {"NoneType", "bool", "list", "collections.abc.Iterable"}  # a number or a text is said by the next kinds
    kinds = set(re.findall(r"Expected an? <class '([\w.]+)'>", block)) - others
    given = _class_given(block)
    if given is None or kinds or not re.search(signs, block):
        return []
    keys = _keys(message)
    known, key = classes(), keys[-1] if keys else ""
    sort = {"logger": "Logger", "lr_scheduler": "LR"}.get(key)
    name = given.rpartition(".")[2]
    found = near(name, [other for other in known if sort and sort in other]) or near(name, known)
    hint = f"; did you mean {' or '.join(repr(known[other]) for other in found)}?" if found else "."
    package = given.partition(".")[0]
    if "." in given and f"No module named '{package}'" in block:
        like = did_you_mean(package, ("lightning_align", "lightning", "torch"))
        hint = f": there is no module {package!r}{like or '. Its file must be in the current folder or in PYTHONPATH.'}"
    return [
        f"no class {given!r} for --{'.'.join(keys)}{hint}" if keys else f"no class {given!r}{hint}",
        "Classes of lightning_align, torch.optim and Lightning need no module path. Give others as package.module.Class",
        f"Help: {call} --help",
    ]


def _no_choice(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    block = _block(message)
    choices = list(dict.fromkeys(re.findall(r"'([^']*)'", " ".join(re.findall(r"Literal\[(.*?)\]", block)))))
    value = _value(block)
    if not choices or value is None:
        return []
    keys = _keys(message)
    name = keys[-1] if keys else "value"
    kinds = (("a mapping", "dict"), ("a number", "float"), ("an integer", "int"))
    others = [kind for kind, typed in kinds if f"Expected a <class '{typed}'>" in block]
    either = "".join(f", or {kind}" for kind in others)
    return [
        f"no {name.rpartition('.')[2]} {value!r}{did_you_mean(value, choices) or '.'}",
        f"--{'.'.join(keys)} is one of: {', '.join(choices)}{either}",
        f"Help: {call} {_help_flag(message, _last_class(message))}",
    ]


def _wrong_type(message: str, call: str, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    block = _block(message)
    value = _value(block)
    kinds = list(dict.fromkeys(re.findall(r"Expected an? <class '([\w.]+)'>", block)))
    kinds = [
        {"NoneType": "null", "str": "text", "int": "an integer", "float": "a number", **PLAIN}.get(kind, kind) for kind in kinds
    ]
    keys = _keys(message)
    if not kinds or value is None or not keys:
        return []
    # "null" stands for the absence of a value, and is last.
    kinds = sorted(set(kinds), key=lambda kind: (kind == "null", kinds.index(kind)))
    return [
        f"--{'.'.join(keys)} must be {' or '.join(kinds)}, but got {value!r}.",
        f"Help: {call} {_help_flag(message, _last_class(message))}",
    ]


# -- parts of a message


def _keys(message: str) -> list[str]:
    """Return the nested keys down to the innermost one, such as ``["model", "loss"]``."""
    return list(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))


def _block(message: str) -> str:
    """Return what is said of the innermost key."""
    found = list(re.finditer(r'^( *)(?:- )?Parser key "', message, re.MULTILINE))
    if not found:
        return message
    first, *rest = message[found[-1].start() :].splitlines()
    indent = len(first) - len(first.lstrip())
    lines = [first]
    for line in rest:
        if line.strip() and len(line) - len(line.lstrip()) <= indent and indent:
            break
        lines.append(line)
    return "\n".join(lines)


def _value(block: str) -> str | None:
    match = re.search(r"(?:Got value|Given value): ([^\n]*?)(?:\. Got value: .*)?$", block, re.MULTILINE)
    if match is None:
        return None
    nested = re.search(r"NestedArg\(key='[^']*', val='([^']*)'\)", match[1])
    return str(nested[1] if nested else match[1].strip())


def _class_given(block: str) -> str | None:
    """Return the path of the class that cannot be imported."""
    named = re.search(r"Expected a dot import path string: ([^\s]+)", block)
    if named:
        return named[1]
    value = re.search(
        r"(?:has no attribute|No module named|cannot import)[^\n]*Got value: Namespace\(class_path='([^']+)'", block
    )
    inside = value or re.search(r"class_path'?[:=] ?'([\w.]+)'", _value(block) or "")
    return inside[1] if inside else _value(block)


def _last_class(message: str) -> str:
    return str((re.findall(r"class_path '([^']+)'", message) or [""])[-1])


def _help_flag(message: str, path: str) -> str:
    keys = _keys(message)
    outer = (re.findall(r"class_path '([^']+)'", message) or [path])[0]
    return f"--{keys[0]}.help {_short(outer)}" if keys and outer else "--help"


def _short(path: str) -> str:
    """Return the name by which the command line knows a class."""
    return path.rpartition(".")[2]


def _innermost(message: str) -> list[str]:
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>", "Problem with given")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith((*noise, "Parser key")) and line != "-"]
    prefix = f"--{'.'.join(_keys(message))}: " if _keys(message) else ""
    return [prefix + kept[0], *kept[1:]] if kept else [message.splitlines()[0]]
