"""One truth about ends in a run: a chat model with two ends and a padded vocabulary, from self-play to its export."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align.export.callback import ExportModel
from lightning_align.generation.sampler import GenerationConfig, generate
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.sft.datamodule import SFTDataModule
from lightning_align.sft.module import SFTModule
from lightning_align.spin.callbacks import SelfPlayGeneration
from lightning_align.spin.datamodule import SPINDataModule
from lightning_align.spin.generations import answer_ids, statistics
from lightning_align.spin.module import SPINModule
from lightning_align.training.callbacks import SampleLogger
from tests.spin.runs import set_rows
from tests.toys import tiny_palm

SPECIALS = ["<pad>", "<eos>", "<turn>", "<end_of_turn>", "<other>"]
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
EOS, END_OF_TURN, OTHER = 1, 3, 4


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that says one token, `<other>` unless it is trained, and its tokenizer of characters."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    vocabulary = [*SPECIALS, *"abcdefghijklmnopqrstuvwxyz0123456789+= \n"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    model.decoder = tokenizers.decoders.Fuse()
    model.add_special_tokens(SPECIALS)
    source = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")
    source.chat_template = TEMPLATE
    source.save_pretrained("chat")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        llama.model.embed_tokens.weight.fill_(1)
        llama.lm_head.weight.zero_()
        llama.lm_head.weight[OTHER] = 1
        llama.lm_head.weight[60] = 2  # likelier, but no token of the tokenizer
    llama.generation_config.eos_token_id = [EOS, OTHER]
    llama.save_pretrained("chat")
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    Path("rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    return tmp_path


def trainer(*callbacks: Any, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), num_sanity_val_steps=0, **{**quiet, **options})


DATA: dict[str, Any] = {"batch_size": 4, "max_length": 64, "tokenizer": "chat", "cache_dir": "cache"}
GREEDY = GenerationConfig(max_new_tokens=6, temperature=0, batch_size=4)


def test_self_play_ends_where_the_model_does_and_its_export_says_so(chat: Path) -> None:
    module = SPINModule(PretrainedLM("chat"), generation=GREEDY)
    play = SelfPlayGeneration(iterations=1, folder=str(chat / "sets"))
    run = trainer(play, ExportModel("export"), max_epochs=-1)
    data = SPINDataModule("rows.jsonl", **DATA)
    run.fit(module, data)
    for row in set_rows(chat, 0):
        (answer,) = row["generated"]
        assert (answer["tokens"], answer["reason"], answer["end"]) == ([], "eos", OTHER)
        assert answer_ids(answer, EOS) == [OTHER]
        # The real response keeps the end of the template, and only that.
        stored = data._store("train")[row["row"]]
        real = stored.sides[0].tokens[stored.num_prompt :].tolist()
        assert real[-1] == END_OF_TURN and data.tokenizer.decode(real, skip_special=False) == "2<end_of_turn>"
    assert module.ends().ids == (EOS, END_OF_TURN, OTHER)
    settings = json.loads(Path("export/generation_config.json").read_text())
    assert settings["eos_token_id"] == [EOS, END_OF_TURN, OTHER]
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained("export")
    assert theirs.generation_config.eos_token_id == [EOS, END_OF_TURN, OTHER]
    assert PretrainedLM("export").eos_ids == (EOS, END_OF_TURN, OTHER)


def test_predict_and_samples_end_there_too(chat: Path) -> None:
    (chat / "prompts.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "1+1="}]}) + "\n")
    for ends, finished in (([EOS, OTHER], True), ([EOS], False)):
        backbone = PretrainedLM("chat", eos_token_id=ends)
        module = SFTModule(backbone, generation=GREEDY)
        data = SFTDataModule("rows.jsonl", validation="rows.jsonl", predict="prompts.jsonl", **DATA)
        run = trainer(SampleLogger(num_samples=1, max_new_tokens=6), max_steps=1, default_root_dir=f"run{finished}")
        run.validate(module, data, verbose=False)
        sample = json.loads(Path(f"run{finished}/samples.jsonl").read_text())
        assert sample["generated"] == ""  # special tokens and ids without a token say nothing
        ((row,),) = run.predict(module, data)
        assert row["finished"] == [finished] and row["responses"] == [""]


def test_the_user_adds_ends_for_one_model(chat: Path) -> None:
    generation = GenerationConfig(max_new_tokens=6, temperature=0, eos_token="<other>")
    (chat / "prompts.jsonl").write_text(json.dumps({"prompt": "1+1="}) + "\n")
    module = SFTModule(PretrainedLM("chat", eos_token_id=[]), generation=generation)
    ((row,),) = trainer().predict(module, SFTDataModule(predict="prompts.jsonl", **DATA))
    assert row["finished"] == [True]


def test_a_base_model_gets_its_end_from_the_user(chat: Path) -> None:
    """Rows without a template end with the given token, and generation ends there."""
    (chat / "plain.jsonl").write_text(json.dumps({"prompt": "1+1=", "response": "2"}) + "\n")
    data = SFTDataModule("plain.jsonl", **{**DATA, "tokenizer": "chat?eos_token=<other>"})
    data.prepare_data()
    data.setup("fit")
    side = data._store("train")[0].sides[0]
    assert side.tokens[-1] == OTHER and bool(side.targets[-1])
    assert data.tokenizer.eos_id == OTHER


def test_rows_of_earlier_versions_end_with_the_end_of_the_tokenizer() -> None:
    """They have no `end`. Rows of engines count the ids that do not exist."""
    earlier = {"iteration": 0, "tokens": [7], "reason": "eos", "logprob": -1.0, "sampled_logprob": None}
    assert answer_ids(earlier, 2) == [7, 2] and answer_ids({**earlier, "end": 5}, 2) == [7, 5]
    assert answer_ids({**earlier, "reason": "length", "end": None}, 2) == [7]
    rows = [{"row": 0, "real_logprob": -1.0, "generated": [earlier, {**earlier, "end": 5, "unsupported": 3}]}]
    told = statistics(rows, iteration=0, eos_id=2, real={0: [7, 5]})
    assert told["unsupported"] == 3 and told["tie_rate"] == 0.5 and told["length"] == 2
    assert "unsupported" not in statistics([{**rows[0], "generated": [earlier]}], iteration=0, eos_id=2, real={0: [7]})


# The rows of the user come in one loader, without one for validation.
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("mode", ["per_step", "per_iteration"])
def test_rows_of_ids_train_without_a_tokenizer(tmp_path: Path, mode: str) -> None:
    tokens = torch.randint(3, 200, (4, 10), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "mask": tokens > 0, "targets": (tokens > 0) & (torch.arange(10) >= 4)}
    backbone = tiny_palm(num_tokens=259)
    (free,) = generate(backbone, [tokens[0, :4].tolist()], GREEDY)[0]
    config = GenerationConfig(max_new_tokens=6, temperature=0, eos_token=free.tokens[1])
    module = SPINModule(backbone, generate=mode, generation=config)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    run = trainer(SelfPlayGeneration(iterations=1, folder=str(tmp_path / "sets")), max_epochs=-1)
    run.fit(module, DataLoader([batch], batch_size=None))
    assert module.ends().ids == (free.tokens[1],)
    assert any(not torch.equal(value, before[name]) for name, value in module.policy.state_dict().items())
