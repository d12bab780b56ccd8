"""Calls whose arguments have grown since torch 2.11, the oldest supported release, use only what that release has."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "lightning_align").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
# The names of all arguments in torch 2.11.0, in their order.
OLDEST = {
    "fully_shard": "module mesh reshard_after_forward shard_placement_fn mp_policy offload_policy ignored_params",
    "MixedPrecisionPolicy": "param_dtype reduce_dtype output_dtype cast_forward_inputs",
    "distribute_tensor": "tensor device_mesh placements src_data_rank",
    "varlen_attn": "query key value cu_seq_q cu_seq_k max_q max_k return_aux scale window_size",
    "flex_attention": "query key value score_mod block_mask scale enable_gqa return_lse kernel_options return_aux",
    "create_block_mask": "mask_mod B H Q_LEN KV_LEN device BLOCK_SIZE _compile",
    "sdpa_kernel": "backends set_priority",
    "mm": "input mat2 out_dtype out",
    "GradScaler": "device init_scale growth_factor backoff_factor growth_interval enabled",
    "get_memory_info": "device_index",
}
NEEDED = {"varlen_attn": 7}
"""Arguments that have no default there. Since then ``cu_seq_k`` may be None, but it is still given."""


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def problems(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or name_of(node) not in OLDEST:
            continue
        name = name_of(node)
        known = OLDEST[name].split()
        if unknown := [given.arg for given in node.keywords if given.arg is not None and given.arg not in known]:
            yield f"line {node.lineno}: {name} has no argument {', '.join(unknown)}"
        if not any(isinstance(given, ast.Starred) for given in node.args):
            if len(node.args) > len(known):
                yield f"line {node.lineno}: {name} has only {len(known)} arguments"
            named = {given.arg for given in node.keywords}
            missing = [part for part in known[len(node.args) : NEEDED.get(name, 0)] if part not in named]
            if missing and None not in named:
                yield f"line {node.lineno}: {name} needs {', '.join(missing)}"


def test_calls_use_only_arguments_of_the_oldest_torch() -> None:
    found = {str(path.relative_to(ROOT)): list(problems(path.read_text(encoding="utf-8"))) for path in FILES}
    assert not {path: said for path, said in found.items() if said}
    assert any("fully_shard(" in path.read_text(encoding="utf-8") for path in FILES)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("fully_shard(model, dp_mesh_dims=dims)", "no argument dp_mesh_dims"),
        ("varlen.varlen_attn(q, k, v, ends, ends, 4, 4, enable_gqa=True)", "no argument enable_gqa"),
        ("varlen_attn(q, k, v, ends, max_q=4, max_k=4)", "needs cu_seq_k"),
        ("create_block_mask(f, 1, 1, 8, 8, 'cuda', 128, False, True)", "only 8 arguments"),
        ("torch.mm(a, b, out_dtype=torch.float32)", ""),
        ("varlen_attn(*given, **more)", ""),
    ],
)
def test_newer_arguments_are_found(call: str, said: str) -> None:
    found = list(problems(call))
    assert [said in one for one in found] == ([True] if said else [])


@pytest.mark.parametrize(
    "name",
    [
        "accelerator.is_available",
        "accelerator.get_memory_info",
        "get_float32_matmul_precision",
        "distributed.fsdp.register_fsdp_forward_method",
        "distributed.tensor.DTensor",
        "amp.GradScaler",
        "nn.attention.SDPBackend.CUDNN_ATTENTION",
    ],
)
def test_names_that_the_package_takes_for_granted_exist(name: str) -> None:
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.nn.attention  # attributes of torch from here on

    found = torch
    for part in name.split("."):
        found = getattr(found, part)
    assert found is not None
