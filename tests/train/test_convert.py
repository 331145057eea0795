"""Models go between our checkpoints, Hugging Face folders and Megatron-LM's, bit for bit; settings of others become ours."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tomllib
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import transformers

from fmegatron import cli, config, models, optim, toml, tree
from fmegatron.models import Config, from_hf, gpt
from fmegatron.nn.moe import Moe
from fmegatron.sharding import SINGLE
from fmegatron.train import checkpoint, convert, megatron, migrate, migrate_flags, migrate_titan, migrate_words, saving
from fmegatron.train.state import init

HERE = Path(__file__).parent
CONFIG = Config(layers=3, embed=16, heads=4, kv=2, mlp=24, vocab=29, vocab_pad=8, context=16, tied=True)


def run_folder(folder):
    """A run's folder with a checkpoint and a tokenizer."""
    model = gpt(CONFIG)
    state = init(model, optim.adamw(1e-3), SINGLE, key=3)
    plain = json.loads(json.dumps(CONFIG.__dict__))
    saving.save(folder / "checkpoints", model, SINGLE, state, {"model": plain, "config": ""})
    (folder / "tokenizer.json").write_text("{}")
    return model, state.params


def equal(a, b):
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def test_to_hugging_face_and_back(tmp_path, capsys):
    model, params = run_folder(tmp_path / "run")
    assert cli.main(["convert", str(tmp_path / "run"), "--to", "hf", str(tmp_path / "hf"), "--file-bytes", "3000"]) == 0
    assert f"wrote {tmp_path / 'hf'}" in capsys.readouterr().out
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}" and len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    tokens = torch.arange(22).reshape(2, 11)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    torch.testing.assert_close(theirs(tokens).logits, model.logits(params, tokens), atol=1e-6, rtol=1e-5)

    assert cli.main(["convert", str(tmp_path / "hf"), "--to", "checkpoint", str(tmp_path / "back")]) == 0
    meta = checkpoint.read_meta(tmp_path / "back" / "checkpoints")
    back = saving.load_params(tmp_path / "back" / "checkpoints", model, SINGLE)
    assert equal(back, params) and meta["holds"] == "params" and convert.model_of(meta).count() == model.count()
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    best = checkpoint.find(tmp_path / "back" / "checkpoints").rename(tmp_path / "best")  # whatever a folder is called
    assert cli.main(["convert", str(best), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    _, half = from_hf(tmp_path / "half", dtype=torch.bfloat16, vocab_pad=8)
    assert equal(half, tree.map(torch.Tensor.bfloat16, params))
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert cli.main(["convert", str(tmp_path / "half"), "--to", "checkpoint", str(tmp_path / "halves")]) == 0
    assert {dtype for _, dtype in checkpoint.tensors(tmp_path / "halves/checkpoints").values()} == {torch.bfloat16}


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    run_folder(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for words, message in (
        (["nowhere", "out"], "nowhere: no such folder\n"),
        ([str(tmp_path / "run/checkpoints/step-00000007"), "out"], "no such folder; beside it the nearest is step-00000000\n"),
        ([str(tmp_path / "run/step-7"), "out"], "step-7: no such folder; beside it the nearest is step-00000000\n"),
        ([str(tmp_path / "full"), "out"], "neither a run, a checkpoint, a Hugging Face folder nor"),
        ([str(tmp_path / "run"), str(tmp_path / "full")], "exists and is not empty"),
        ([str(tmp_path / "run")], "expected CHECKPOINT|HF_FOLDER|MEGATRON FOLDER"),
        ([str(tmp_path / "run"), "out", "--to", "onnx"], "--to|to = onnx: expected"),
        (["config", "nowhere"], "nowhere: no such file"),
    ):
        assert cli.main(["convert", *words]) == 2
        said = capsys.readouterr().err
        assert any(part in said for part in message.split("|", 1) + [message]) and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]


FLAGS = {
    "llama": """--num-layers 3 --hidden-size 24 --num-attention-heads 4 --group-query-attention --num-query-groups 2
        --kv-channels 6 --ffn-hidden-size 40 --normalization RMSNorm --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --position-embedding-type rope --vocab-size 53""",
    "gpt2": """--num-layers 3 --hidden-size 24 --num-attention-heads 4 --ffn-hidden-size 40
        --max-position-embeddings 64 --vocab-size 53 --no-bias-gelu-fusion""",
}


@pytest.fixture(scope="module")
def mega(tmp_path_factory):
    """A folder in which Megatron-LM's own code wrote two checkpoints, and the logits of its models."""
    pytest.importorskip("megatron.core", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("mega")
    command = [sys.executable, str(HERE / "megatron_oracle.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    return folder


@pytest.mark.parametrize("kind", FLAGS)
def test_what_megatron_writes_is_read(kind, mega, tmp_path):
    (tmp_path / "flags").write_text(FLAGS[kind])
    with pytest.raises(ValueError, match="give Megatron-LM's flags with --config FILE"):
        convert.open_source(str(mega / kind), ExitStack())
    words = ["convert", str(mega / kind), "--to", "checkpoint", str(tmp_path / "ours"), "--config", str(tmp_path / "flags")]
    assert cli.main(words) == 0
    found = checkpoint.find(tmp_path / "ours" / "checkpoints")
    assert found.name == "step-00000005"
    model = convert.model_of(checkpoint.read_meta(found))
    params = saving.load_params(found, model, SINGLE)
    want = torch.load(mega / f"{kind}.logits")
    got = model.logits(params, want["tokens"])
    torch.testing.assert_close(got, want["logits"][..., :53], atol=1e-5, rtol=1e-4)


def test_arguments_that_megatron_saved_are_read_inertly(tmp_path):
    """Plain settings come out of its namespace; a class that is not here, and one that would act, are nothing."""
    import argparse

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    args = argparse.Namespace(num_layers=3, swiglu=True, evil=Evil(), lr=0.1, dtype=torch.bfloat16)
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps({"args": args}))
    assert megatron._args(tmp_path) == {"num_layers": 3, "swiglu": True, "lr": 0.1}
    assert not (tmp_path / "made").exists()


MEGATRON = FLAGS["llama"].replace("\n", " \\\n") + """ \\
    --micro-batch-size 2 --global-batch-size 16 --train-iters 500 --seq-length 64 --max-position-embeddings 64 --bf16 \\
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 20 --lr-decay-iters 400 --adam-beta2 0.95 \\
    --weight-decay 0.1 --clip-grad 1.0 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer \\
    --save-interval 100 --async-save --finetune --exotic-flag 7 --fp16-lm-cross-entropy
"""


def test_megatron_flags_become_ours(tmp_path, capsys):
    (tmp_path / "pretrain.sh").write_text("torchrun pretrain_gpt.py " + MEGATRON)
    assert cli.main(["convert", "config", str(tmp_path / "pretrain.sh"), str(tmp_path / "ours.toml")]) == 0
    said = capsys.readouterr().err
    assert "no counterpart: exotic_flag = 7\n" in said and "no counterpart: fp16_lm_cross_entropy = True\n" in said
    assert said.count("\n") == 2, said
    run = config.load(tmp_path / "ours.toml")
    assert run.model.overrides["kv"] == 2 and run.model.overrides["vocab_pad"] == 128
    assert (run.optimizer.schedule, run.optimizer.warmup, run.optimizer.decay_steps) == ("cosine", 20, 380)
    assert run.optimizer.betas == (0.9, 0.95) and run.training.dtype == "bf16" and run.mesh.tp == 2
    assert run.sharding.rules == "zero1_tp_sp" and run.checkpoint.background and run.checkpoint.load == "params"
    model = gpt(Config(**migrate.model_of(migrate_words.flags_of(MEGATRON))[0]))
    assert model.config.activation == "swiglu" and not model.config.tied


def test_every_mapped_key_exists():
    known = {key for key, *_ in toml.options(config.RunConfig)}
    keys = {*migrate.PRECISION.values(), *migrate.RUN.values(), *migrate_flags.PLAIN.values(), *migrate_titan.TITAN.values()}
    fields = {key.removeprefix("model.") for key in keys if key.startswith("model.")} - {"preset"}
    assert {key for key in keys if key.removeprefix("model.") not in fields} <= known
    assert {*migrate.MODEL.values(), *fields} <= set(Config.__dataclass_fields__)
    assert set(migrate_flags.EXPERTS.values()) | set(migrate_flags.BALANCE.values()) <= set(Moe.__dataclass_fields__)
    read = [migrate.MODEL, migrate.RUN, migrate.PRECISION, migrate.PRECISION_SWITCHES, migrate.MODEL_SWITCHES,
            migrate.RUN_SWITCHES, migrate.SILENT, migrate_flags.READ]
    assert sum(map(len, read)) == len(set().union(*read))


SCRIPTS = {
    "arrays": """
# Don't run this as it is
SIZE=24
export HEADS=${HEADS:-4}   # isn't set
LAYERS=( )
ARGS=(
    --num-layers 3 --hidden-size $SIZE  # wide
    --num-attention-heads "${HEADS}"
#   --num-layers 7
    --data-path 0.3
       /a 0.7 /b
)
if [[ "$SIZE" == "9" ]]; then
    ARGS+=( "--split '9,1,0'" )
fi
echo "Error: it isn't --seen"; torchrun ${LAUNCH[@]} pretrain_gpt.py \\
    ${ARGS[@]} --save $1 \\
    --swiglu
""",
    "strings": """
SIZE=24
ARGS="
    --num-layers 3 --hidden-size $SIZE \\
    --num-attention-heads 4 --data-path 0.3 /a 0.7 /b"
torchrun pretrain_gpt.py $ARGS --split 9,1,0 --save $1 --swiglu
echo done
""",
    "words": "--num-layers 3 --hidden-size=24 --num-attention-heads 4 --data-path 0.3 /a 0.7 /b --split 9,1,0 --save $1 "
             "--swiglu",
    "yaml": "MODEL_ARGS:\n  --num-layers: 3\n  --hidden-size: 24\n  --num-attention-heads: 4\n  --data-path: 0.3 /a 0.7 /b\n"
            "  --split: 9,1,0\n  --save: $1\n  --swiglu: true\n",
}


@pytest.mark.parametrize("form", SCRIPTS)
def test_flags_are_found_in_scripts_of_all_forms(form):
    assert migrate_words.flags_of(SCRIPTS[form]) == {
        "num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "data_path": [0.3, "/a", 0.7, "/b"], "split": "9,1,0",
        "save": "$1", "swiglu": True}  # fmt: skip


@pytest.mark.parametrize("flags", [
    FLAGS["llama"], FLAGS["gpt2"], "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --position-embedding-type rope",
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --rotary-base 5e5 --norm-epsilon 1e-6 --normalization RMSNorm "
    "--use-rotary-position-embeddings", "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --rotary-base 5e5",
])  # fmt: skip
def test_the_converted_run_has_their_model_and_not_our_presets(flags, tmp_path):
    """All that is not said is Megatron-LM's default: what is trained is what its checkpoint would be read as."""
    run = converted(flags, tmp_path)
    fields = migrate.model_of(migrate_words.flags_of(flags))[0]
    assert models.preset(run.model.preset, **run.model.overrides).config == Config(**fields)
    assert fields["tied"] == ("untie" not in flags)
    said = (5e5, 1e-6) if "RMSNorm --use" in flags else (10000, 1e-5)
    assert (fields["rope_base"], fields["norm_eps"]) == said
    assert (run.optimizer.warmup, run.run.seed, run.checkpoint.keep, run.checkpoint.interval) == (0, 1234, 0, 0)
    assert (run.validation.interval, run.validation.batches, run.data.document_mask) == (1000, 100, False)


def test_strictness_means_what_it_means_there():
    """Unexpected there: asked for, and not in the checkpoint. So of the four that raise or not, by its own words:"""
    raises = {"raise_all": "both", "raise_unexpected": "missing", "assume_ok_unexpected": "missing"}
    other = dict.fromkeys(("log_unexpected", "log_all", "return_unexpected", "return_all", "ignore_all"), "none")
    assert migrate.STRICT == raises | other


@pytest.mark.parametrize("name, text, code, said", [
    ("a.sh", "--num-layers 2 --hidden-size 64", 2, "a.sh: Megatron-LM's flags lack --num-attention-heads: it has no default"),
    ("a.sh", "--num-layers two --hidden-size 64 --num-attention-heads 4", 2, "flag --num-layers has two: it takes a number"),
    ("a.sh", "--num-layers --hidden-size 64 --num-attention-heads 4", 2, "flag --num-layers has no value: it takes a number"),
    ("a.sh", "--num-layers 2 --name 'open", 2, "a.sh: No closing quotation"),
    ("a.sh", f"{FLAGS['gpt2']} --lr-warmup-iters x --lr-decay-iters 10", 2, "flag --lr-warmup-iters has x: it takes a number"),
    ("a.sh", "", 2, "a.sh: Megatron-LM's flags lack --num-layers: it has no default"),
    ("a.sh", f"{FLAGS['gpt2']} --normalization Foo", 0, "no counterpart: normalization = Foo"),
    ("a.sh", f"{FLAGS['gpt2']} --optimizer foo", 0, "no counterpart: optimizer.name = foo: known are"),
    ("a.sh", f"{FLAGS['gpt2']} --recompute-granularity foo", 0, "foo"),
    ("a.sh", f"{FLAGS['gpt2']} --train-iters many", 0, 'no counterpart: training.steps = "many": expected int'),
    ("a.sh", f"{FLAGS['gpt2']} --micro-batch-size 2", 0, "no counterpart: global_batch_size, which is micro_batch_size times"),
    ("a.sh", f"{FLAGS['gpt2']} --data-path $1", 0, "no counterpart: data_path = $1: the file does not set it"),
    ("a.toml", "[model", 2, "a.toml: Expected ']'"),
    ("a.toml", '[lr_scheduler]\ndecay_ratio = "x"', 2, "a.toml: lr_scheduler.decay_ratio = 'x': expected a number"),
    ("a.toml", '[checkpoint]\nexport_dtype = "float8"', 0, 'checkpoint.export_dtype = "float8": expected fp32|bf16|fp16'),
    ("a.toml", '[model]\nname = "llama4"\nflavor = "17bx16e"', 0, "model preset 'llama4:17bx16e': unknown family 'llama4'"),
])  # fmt: skip
def test_mistakes_in_other_peoples_settings_are_one_line(name, text, code, said, tmp_path, capsys):
    """2: nothing is written. 0: what ours cannot take is told, and the rest is a run that loads."""
    (tmp_path / name).write_text(text)
    assert cli.main(["convert", "config", str(tmp_path / name), str(tmp_path / "ours.toml")]) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert (tmp_path / "ours.toml").exists() == (code == 0)
    if code == 0:
        config.load(tmp_path / "ours.toml")
        assert cli.main(["convert", "config", str(tmp_path / name), str(tmp_path / name)]) == 2  # theirs is never overwritten
        assert "exists: name a new file" in capsys.readouterr().err and (tmp_path / name).read_text() == text


WHOLE = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --global-batch-size 8 --micro-batch-size 1"


@pytest.mark.parametrize("flags, ours", [
    ("--num-experts 8 --moe-router-topk 4 --moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type seq_aux_loss "
     "--moe-router-pre-softmax --moe-grouped-gemm --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2",
     {"mesh.ep": 2, "model.moe": {"experts": 8, "top_k": 4, "normalize": False, "sequence_loss": 0.01}}),
    ("--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 12 --qk-pos-emb-head-dim 4 --v-head-dim 8 --mtp-num-layers 1",
     {"model.kv_lora": 16, "model.hd": 16, "model.rope_hd": 4, "model.v_hd": 8, "model.mtp": 1}),
    ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
     {"mesh.pp": 2, "pipeline.schedule": "interleaved_1f1b", "pipeline.virtual": 2}),
    ("--train-samples 800 --lr-warmup-samples 80 --lr-decay-samples 400 --rampup-batch-size 2 2 40",
     {"training.steps": 100, "optimizer.unit": "samples", "optimizer.warmup": 80, "optimizer.decay_steps": 320,
      "training.rampup_batch": (2, 2, 40)}),
    ("--start-weight-decay 0.0 --end-weight-decay 0.1 --weight-decay-incr-style cosine --use-checkpoint-opt_param-scheduler",
     {"optimizer.weight_decay_start": 0.0, "optimizer.weight_decay": 0.1, "optimizer.weight_decay_shape": "cosine",
      "optimizer.on_resume": "restore"}),
    ("--exit-duration-in-mins 30 --exit-interval 50 --rerun-mode validate_results --wandb-project p --wandb-exp-name n",
     {"run.minutes": 30.0, "run.exit_interval": 50, "faults.rerun": True, "log.wandb": "p", "run.name": "n"}),
    ("--non-persistent-save-interval 10 --non-persistent-ckpt-type local --non-persistent-local-ckpt-dir /disk --replication "
     "--replication-jump 4 --replication-factor 3",
     {"local.interval": 10, "local.folder": "/disk", "local.jump": 4, "local.factor": 3}),
    ("--non-persistent-save-interval 10 --non-persistent-ckpt-type local --replication-factor 3", {"local.factor": 1}),
    ("--optimizer sgd --lr-decay-style inverse-square-root --lr-decay-iters 30", {
        "optimizer.momentum": 0.9, "optimizer.schedule": "inverse_sqrt", "optimizer.warmup": 0, "optimizer.decay_steps": 30}),
    ("--optimizer lion --min-lr 1e-5 --lr 1e-4", {"optimizer.betas": None, "optimizer.name": "lion"}),
    ("--manual-gc --manual-gc-interval 7 --no-manual-gc-eval", {"training.collect": 7}),
    ("--manual-gc-interval 7", {"training.collect": 50}),
    ("--profile --profile-step-start 3 --profile-step-end 5 --profile-ranks 0 1 --train-iters 9 --log-params-norm",
     {"profile.steps": (4, 5), "profile.ranks": (0, 1), "monitors.norms": 1}),
    ("--fp8-format hybrid --fp8-recipe tensorwise --bf16", {"fp8.recipe": "tensorwise", "fp8.format": "hybrid"}),
    ("--data-path 0.3 /a 0.7 /b", {"data.blend": {"/a": 0.3, "/b": 0.7}, "data.order": "megatron", "data.split": "969,30,1"}),
    ("--mock-data --split 99,1,0 --tokenizer-type NullTokenizer --vocab-size 99 --eod-mask-loss --reset-position-ids",
     {"data.source": "mock", "data.split": "99,1,0", "data.tokenizer": "null:99", "data.eod_mask_loss": True,
      "data.reset_positions": True, "data.document_mask": False}),
    ("--save /x --load /x --save-retain-interval 100", {"checkpoint.resume": None, "checkpoint.keep": 1,
                                                         "checkpoint.keep_every": 100, "run.dir": "/x"}),
    ("--load /y --no-load-optim --dist-ckpt-strictness log_all --kv-channels 16 --num-query-groups 2",
     {"checkpoint.resume": "/y", "checkpoint.load": "params", "checkpoint.strict": "none", "model.kv": 2}),
    ("--num-query-groups 2 --group-query-attention=false", {"model.kv": 4}),
])  # fmt: skip
def test_megatron_flags_that_say_a_thing_together(flags, ours, tmp_path):
    run = converted(f"{WHOLE} {flags}", tmp_path)
    for key, value in ours.items():
        group, name = key.split(".")
        assert (run.model.overrides[name] if group == "model" else getattr(getattr(run, group), name)) == value, key


@pytest.mark.parametrize("flags, ours", [
    ("--fp16", {"dtype": "fp16", "loss_scale": None}),
    ("--fp16 --loss-scale 1024", {"dtype": "fp16", "loss_scale": "1024"}),
    ("--fp16 --initial-loss-scale 65536 --min-loss-scale 1.0 --loss-scale-window 500 --hysteresis 3 --log-num-zeros-in-grad",
     {"initial_loss_scale": 65536.0, "min_loss_scale": 1.0, "loss_scale_window": 500, "hysteresis": 3, "count_zeros": True}),
    ("--bf16 --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32", {"dtype": "bf16", "reduce_dtype": None}),
    ("--bf16 --grad-reduce-in-bf16", {"accumulate_dtype": "bf16", "reduce_dtype": "bf16", "param_dtype": "fp32"}),
    ("--bf16 --use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype fp8 --exp-avg-sq-dtype fp16",
     {"accumulate_dtype": "bf16", "param_dtype": "bf16", "mu_dtype": "fp8", "nu_dtype": "fp16"}),
    ("--bf16 --exp-avg-dtype fp32 --fp32-residual-connection", {"mu_dtype": "fp32", "fp32_residual": True}),
])  # fmt: skip
def test_megatron_flags_of_precision(flags, ours, tmp_path):
    run = converted(f"--num-layers 2 --hidden-size 64 --num-attention-heads 4 {flags}", tmp_path)
    for key, value in ours.items():
        group = run.optimizer if key.startswith(("mu_", "nu_")) else run.training
        assert (run.model.overrides[key] if key == "fp32_residual" else getattr(group, key)) == value, key


def converted(flags, folder):
    """The run that a script with Megatron-LM's flags becomes; each of them has a counterpart."""
    (folder / "pretrain.sh").write_text(flags)
    text, unknown = migrate.convert_config(str(folder / "pretrain.sh"))
    assert unknown == []
    (folder / "ours.toml").write_text(text)
    return config.load(folder / "ours.toml")


TITAN = """
[model]
name = "llama3"
flavor = "debugmodel"
[optimizer]
name = "AdamW"
lr = 8e-4
[lr_scheduler]
warmup_steps = 2
decay_ratio = 0.8
decay_type = "linear"
min_lr_factor = 0.1
[training]
local_batch_size = 8
seq_len = 2048
steps = 10
[parallelism]
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 2
enable_async_tensor_parallel = true
pipeline_parallel_degree = 2
pipeline_parallel_schedule = "Interleaved1F1B"
[comm]
train_timeout_seconds = 90
[metrics]
enable_wandb = true
[checkpoint]
interval = 500
last_save_model_only = true
export_dtype = "bfloat16"
async_mode = "async"
[activation_checkpoint]
mode = "selective"
"""


REPLICAS, SHARDS = (f"parallelism.data_parallel_{kind}_degree" for kind in ("replicate", "shard"))


def test_what_torchtitan_does_not_say_has_its_defaults():
    given = {"lr_scheduler": {"decay_type": "sqrt"}, "training": {"gc_freq": 20}}
    table, unknown = migrate_titan.from_torchtitan(given)
    run = toml.update(config.RunConfig(), table, "test")
    assert (run.optimizer.lr, run.optimizer.warmup, run.training.steps, run.training.collect) == (8e-4, 200, 10000, 20)
    assert (run.optimizer.schedule, run.optimizer.decay_shape, run.optimizer.decay_steps) == ("wsd", "minus_sqrt", 9800)
    assert run.optimizer.betas == (0.9, 0.95) and (run.checkpoint.load, run.sharding.rules) == ("state", "fsdp_tp_sp")
    assert not unknown


@pytest.mark.parametrize("given, ours", [
    ({"optimizer.lr": 3e-4, "lr_scheduler.min_lr_factor": 0.1}, {"optimizer.min_lr": 3e-5}),
    ({"lr_scheduler.min_lr_factor": 0.1}, {"optimizer.min_lr": 8e-5}),
    ({"checkpoint.initial_load_path": "/x", "checkpoint.initial_load_model_only": True},
     {"checkpoint.resume": "/x", "checkpoint.load": "params", "checkpoint.last_model_only": False}),
    ({"checkpoint.initial_load_path": "/x", "checkpoint.last_save_model_only": True}, {"checkpoint.load": "state"}),
    ({REPLICAS: 2, SHARDS: 1}, {"mesh.dp": 2, "mesh.fsdp": 1, "sharding.rules": "fsdp_tp_sp"}),
    ({REPLICAS: 2, SHARDS: 4}, {"mesh.dp": 2, "mesh.fsdp": 4, "sharding.rules": "hsdp_tp_sp"}),
    ({REPLICAS: 2}, {"mesh.dp": -1, "mesh.fsdp": 1, "sharding.rules": "fsdp_tp_sp"}),  # hsdp on an axis of 1 shards nothing
])  # fmt: skip
def test_torchtitan_keys_that_say_a_thing_together(given, ours):
    groups = {}
    for key, value in given.items():
        migrate_flags.put(groups, key, value)
    table, unknown = migrate_titan.from_torchtitan(groups)
    run = toml.update(config.RunConfig(), table, "test")
    found = {key: getattr(getattr(run, key.split(".")[0]), key.split(".")[1]) for key in ours}
    assert found == pytest.approx(ours) if "optimizer.min_lr" in ours else found == ours
    assert len(unknown) == (given == {REPLICAS: 2}) and all("say mesh.fsdp" in line for line in unknown)


def test_torchtitan_toml_becomes_ours(tmp_path, capsys):
    (tmp_path / "titan.toml").write_text(TITAN)
    assert cli.main(["convert", "config", str(tmp_path / "titan.toml")]) == 0
    out, said = capsys.readouterr()
    (tmp_path / "ours.toml").write_text(out)
    run = config.load(tmp_path / "ours.toml")
    assert run.model.preset == "llama3:debug" and run.mesh.tp == 2 and run.mesh.dp == -1 and run.data.seq == 2048
    assert (run.optimizer.schedule, run.optimizer.decay_steps) == ("wsd", 8) and run.optimizer.min_lr == pytest.approx(8e-5)
    assert run.checkpoint.last_model_only and run.checkpoint.export_dtype == "bf16" and run.checkpoint.background
    assert (run.mesh.pp, run.pipeline.schedule, run.pipeline.virtual) == (2, "interleaved_1f1b", 2)
    assert run.faults.train_timeout == 90 and run.log.wandb == "torchtitan"
    lost = {line.split(": ")[1].split(" = ")[0] for line in said.splitlines()}
    assert lost == {"training.local_batch_size", "parallelism.enable_async_tensor_parallel"}
    assert tomllib.loads(out)["training"]["remat"] == "selective"
