"""Answer the prompts that `FileBackend` wrote, with vLLM. Run it where the hand-off folder and vLLM are.

python examples/vllm_generate.py hand_off/iteration_0            one iteration
python examples/vllm_generate.py hand_off/iteration_0 --watch    wait for more prompts of this iteration

Each file of prompts gets a file of responses, which appears when it is complete. Prompts that have responses are not answered
again. The script needs only vLLM and the standard library.
"""

import argparse
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def load_vllm(model: str, requests_of: Callable[[Row], Row]) -> Callable[[list[Row]], list[Any]]:
    """Open a model folder with vLLM. Returns a function from rows of prompts to vLLM's outputs. Only this needs vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model)

    def answer(rows: list[Row]) -> list[Any]:
        prompts = [{"prompt_token_ids": row["prompt"]} for row in rows]
        outputs: list[Any] = llm.generate(prompts, [SamplingParams(**requests_of(row)) for row in rows])
        return outputs

    return answer


def sampling(settings: Row, row: Row) -> Row:
    """Return the arguments of ``SamplingParams`` for a prompt. Each prompt has its own seed and limit."""
    given = settings["sampling"]
    seed = zlib.crc32(f"{given['seed']}-{settings['iteration']}-{row['id']}".encode()) & 0x7FFFFFFF
    return {**given, "n": row["num_samples"], "max_tokens": row["max_tokens"], "seed": seed, "logprobs": 0}


def response(completion: Any, eos_ids: list[int]) -> Row:
    """Bring a ``CompletionOutput`` into the form of `FileBackend`."""
    tokens = list(completion.token_ids)
    ended = bool(tokens) and tokens[-1] in eos_ids
    reason = "eos" if ended else {"stop": "stop", "length": "length"}.get(completion.finish_reason, completion.finish_reason)
    if reason == "stop" and not isinstance(completion.stop_reason, str):
        reason = "eos"  # vLLM left the end-of-sequence id out
    told: Row = {"tokens": tokens, "reason": reason}
    if isinstance(completion.stop_reason, int):
        told["end"] = completion.stop_reason
    if completion.logprobs:
        told["logprobs"] = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    return told


def answer_files(folder: Path, answer: Callable[[list[Row]], list[Any]], settings: Row) -> int:
    """Answer each file of prompts that has no responses. Returns how many there were."""
    todo = [path for path in sorted(folder.glob("prompts-*.jsonl")) if not responses_of(path).exists()]
    for path in todo:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        eos_ids = settings["ends"]["eos_token_id"]
        lines = [
            json.dumps({"id": row["id"], "responses": [response(completion, eos_ids) for completion in output.outputs]}) + "\n"
            for row, output in zip(rows, answer(rows), strict=True)
        ]
        temporary = path.with_name(f".{responses_of(path).name}.tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, responses_of(path))
    return len(todo)


def responses_of(prompts: Path) -> Path:
    """Return the path of the responses to a file of prompts."""
    return prompts.with_name(prompts.name.replace("prompts-", "responses-", 1))


def main() -> None:
    """Parse the command line, open the model, answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of an iteration")
    parser.add_argument("--watch", action="store_true", help="wait for more prompts until the process is stopped")
    arguments = parser.parse_args()
    settings = json.loads((arguments.folder / "generation.json").read_text(encoding="utf-8"))
    off = {"typical_p": 1.0, "no_repeat_ngram_size": 0}
    if on := {name: value for name, value in settings["unsupported_by_vllm"].items() if value != off[name]}:
        raise SystemExit(f"vLLM has no {', '.join(on)}. Remove these settings, or use the sampler of lightning_align.")
    answer = load_vllm(str(arguments.folder / settings["model"]), lambda row: sampling(settings, row))
    while True:
        print(f"answered {answer_files(arguments.folder, answer, settings)} files of prompts")
        if not arguments.watch:
            return
        time.sleep(5)


if __name__ == "__main__":
    main()
