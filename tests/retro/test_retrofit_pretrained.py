"""RETRO-fitting of a model of transformers with tied embeddings, grouped queries and peaked logits, like small chat models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import RETRO, RETROModule
from lightning_align.models.pretrained import PretrainedLM
from lightning_align.retrieval.database import RetrievalDatabase
from tests.retro.conftest import SIZE
from tests.retro.test_module import SGD, data, trainer

pytest.importorskip("transformers", reason="needs transformers")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


def test_a_frozen_tied_model_stays_as_it_is_and_is_what_off_measures(database: RetrievalDatabase, tmp_path: Path) -> None:
    torch.manual_seed(0)
    language = PretrainedLM(config=LLAMA)
    with torch.no_grad():
        language.model.model.embed_tokens.weight.mul_(40)  # peaked logits
    before = {name: value.clone() for name, value in language.state_dict().items()}
    fitted = RETROModule(RETRO(language, chunk_size=SIZE, heads=2, dim_head=8, train_decoder=False), optimizer=SGD)
    run = trainer(tmp_path)
    run.fit(fitted, data(database))
    retro = fitted._retro
    after = retro.decoder.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    trained = [name for name, parameter in retro.named_parameters() if parameter.requires_grad]
    assert trained and not any(name.startswith("decoder.") for name in trained)

    batch = next(iter(data(database).val_dataloader()))
    with torch.no_grad():
        off = fitted.logprobs(batch, None)
        on = fitted.logprobs(batch, batch["neighbors"].first(2))
        logits = language.model(input_ids=batch["tokens"], attention_mask=batch["mask"].long()).logits.double()
    slow = logits[:, :-1].log_softmax(-1).gather(2, batch["tokens"][:, 1:, None])[..., 0]
    wanted = slow[batch["targets"][:, 1:]]
    assert float(wanted.abs().max()) > 20, "the logits are not peaked"
    torch.testing.assert_close(off.double(), wanted, rtol=1e-5, atol=1e-3)
    assert not torch.equal(on, off)
