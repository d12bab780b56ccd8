"""Programs that know only transformers read the folders of a PaLM, after importing this package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_align import GenerationConfig, generate
from lightning_align.models.formats import whole_weights, write_model
from tests.toys import VOCABULARY, tiny_palm

transformers = pytest.importorskip("transformers", reason="needs the extra hf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_palm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_model(model, whole_weights(model), tmp_path / "palm")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    return tmp_path / "palm"


@pytest.mark.parametrize("first", ["lightning_align", "transformers"])
def test_importing_both_packages_is_enough(folder: Path, first: str) -> None:
    second = {"lightning_align": "transformers", "transformers": "lightning_align"}[first]
    code = (
        f"import {first}; import {second}; import sys; "
        "assert first_is_light or 'torch' not in sys.modules;"
        "from transformers import AutoConfig, AutoModelForCausalLM; "
        f"print(AutoConfig.from_pretrained({str(folder)!r}).model_type, "
        f"type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    ).replace("first_is_light", str(first == "transformers"))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["lightning_align", "LightningAlignForCausalLM"]


def test_logits_losses_and_padding(folder: Path) -> None:
    model, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), tiny_palm().eval()
    ours.load_state_dict(torch.load(folder.parent / "state.pt", weights_only=True))
    tokens = torch.randint(VOCABULARY, (2, 7))
    torch.testing.assert_close(model(tokens).logits, ours(tokens))
    logps = ours(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(model(tokens, labels=tokens).loss, -logps.mean())
    # Padding on the left and on the right changes nothing for the real tokens.
    for left in (0, 3):
        mask = torch.zeros(2, 10, dtype=torch.long)
        mask[:, left : left + 7] = 1
        padded = torch.zeros(2, 10, dtype=torch.long)
        padded[:, left : left + 7] = tokens
        logits = model(padded, attention_mask=mask).logits[:, left : left + 7]
        torch.testing.assert_close(logits, ours(tokens), atol=1e-5, rtol=1e-5)


def test_generate_of_transformers_gives_the_same_tokens(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompt = [4, 9, 2]
    theirs = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 3).long(), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    ours = generate(model.model, [prompt], GenerationConfig(max_new_tokens=6, temperature=0.0), eos_id=None)
    assert theirs[0, 3:].tolist() == ours[0][0].tokens


def test_a_folder_cannot_name_other_classes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for path in ("os.system", "tests.models.test_auto.PaLM", "lightning_align.models.pretrained.PretrainedLM"):
        (folder / "config.json").write_text(json.dumps({**config, "class_path": path}))
        with pytest.raises(ValueError, match=r"`class_path` must be lightning_align\.models\.palm\.PaLM"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
