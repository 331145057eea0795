"""Checkpoints in a real S3 API server on this machine: what is half-written or damaged there is no checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from fmegatron import cli
from fmegatron.train import checkpoint, remote, saver
from fmegatron.train.checkpoint import Chunks, latest, load, newest_good, read_meta, save, whole
from fmegatron.train.remote import Bucket, Url


@pytest.fixture
def url(s3):
    return f"{s3()}/runs/one"


def put(url, step, **options):
    a = torch.full((64, 8), float(step))
    halves = Chunks((64, 8), (((0, 0), a[:32]), ((32, 0), a[32:])))
    return save(url, step, {"a": halves, "n": whole(torch.tensor(step))}, {"s": step}, **options)


def get(url):
    a, n = torch.zeros(64, 8), torch.tensor(0)
    meta = load(url, {"a": whole(a), "n": whole(n)})
    assert (a == n).all() and meta == {"s": int(n)}
    return int(n)


def names(url):
    return sorted(path.partition("one/")[2] for path in Bucket(Url(url)).fs.find(url))


def test_save_load_keep_and_a_named_step_of_another_run(url):
    for step in (10, 20, 30, 40):
        put(url, step, keep=2, keep_every=20)
    files = ("manifest.json", "rank-00000.safetensors")
    assert names(url) == ["latest", *(f"step-{n:08d}/{file}" for n in (20, 30, 40) for file in files)]
    assert get(url) == 40 and latest(url).name == "step-00000040" and read_meta(url) == {"s": 40}
    assert get(f"{url}/step-00000020") == 20
    put(url, 30)  # again, from a run that was taken up at 20
    assert get(url) == 30
    assert [place.name for place in Bucket(Url(url)).candidates()] == [f"step-{n:08d}" for n in (30, 20, 40)]  # its past first
    other = type(Bucket(Url(url)).fs)(skip_instance_cache=True)  # as another process
    for name in ("manifest.json", "rank-00000.safetensors"):
        other.copy(f"{url}/step-00000040/{name}", f"{url}/step-00000050/{name}")
    assert len(Bucket(Url(url)).candidates()) == 4 and Bucket(Url(url) / "step-00000050").open().damage() == []


def test_the_files_are_those_of_a_folder(url, tmp_path):
    put(url, 5)
    put(tmp_path, 5)
    fs = Bucket(Url(url)).fs
    for name in ("manifest.json", "rank-00000.safetensors"):
        assert fs.cat_file(f"{url}/step-00000005/{name}") == (tmp_path / "step-00000005" / name).read_bytes()


def test_damage_is_named_and_the_newest_good_one_used(url):
    fs = Bucket(Url(url)).fs
    for step in (10, 20, 30, 40):
        put(url, step)
    fs.rm_file(f"{url}/step-00000040/manifest.json")  # as an upload that was cut off
    whole_file = fs.cat_file(f"{url}/step-00000030/rank-00000.safetensors")
    fs.pipe_file(f"{url}/step-00000030/rank-00000.safetensors", whole_file[:-7])
    found, said = newest_good(url)
    assert found == f"{url}/step-00000020" and "no manifest.json" in said[0] and f"has {len(whole_file) - 7} bytes" in said[1]
    fs.pipe_file(f"{url}/step-00000020/rank-00000.safetensors", whole_file[:-1] + b"!")  # the same size
    with pytest.raises(ValueError, match="step-00000020 is damaged: rank-00000.safetensors has other bytes"):
        get(f"{url}/step-00000020")
    fs.pipe_file(f"{url}/step-00000010/manifest.json", json.dumps({"format": 2}).encode())
    with pytest.raises(ValueError, match="step-00000010 is damaged: manifest.json is damaged"):
        get(f"{url}/step-00000010")


def test_the_marker_comes_last_and_only_after_reading_back(url, monkeypatch):
    put(url, 1)
    plain = tensorfile_write = remote.tensorfile.write

    def torn(file, tensors):
        digest = plain(file, tensors)
        file.write_bytes(file.read_bytes()[:-1] + b"?")  # what arrives is not what was hashed
        return digest

    monkeypatch.setattr(remote.tensorfile, "write", torn)
    with pytest.raises(OSError, match="is not what was written: rank-00000.safetensors has other bytes"):
        put(url, 2)
    monkeypatch.setattr(remote.tensorfile, "write", tensorfile_write)
    assert get(url) == 1 and not any("00000002" in name for name in names(url))
    fs = Bucket(Url(url)).fs  # one instance a bucket
    done, there = [], f"{url}/step-00000003"

    def watched(name):
        plain = getattr(fs, name)

        def call(*args, **options):
            if name in ("rm", "put_file"):  # while its data go or come, it is no checkpoint
                assert not fs.isfile(f"{there}/manifest.json")
            done.append(f"{name} {Url(args[-1 if name == 'put_file' else 0]).name}")
            return plain(*args, **options)

        monkeypatch.setattr(fs, name, call)

    for name in ("rm", "put_file", "pipe_file"):
        watched(name)
    first = ["put_file rank-00000.safetensors", "pipe_file manifest.json", "pipe_file latest"]
    put(url, 3)
    assert done == first and get(url) == 3
    put(url, 3)
    assert done == [*first, "rm step-00000003", *first] and get(url) == 3


def test_in_the_background(url):
    def write(step, items, meta, group):
        return checkpoint.save(url, step, items, meta, group=group)

    def items(state):
        return {key: whole(x) for key, x in state.items()}

    with saver.Saver(write, items, background=True) as behind:
        behind.save({"a": torch.ones(64, 8), "n": torch.tensor(1)}, 1, {"s": 1})
    assert get(url) == 1


def test_no_checkpoint_and_no_bucket(url):
    assert newest_good(f"{url}/none") == (None, [])
    with pytest.raises(ValueError, match="no checkpoint in s3://"):
        get(f"{url}/none")


def test_a_run_in_object_storage(url, functions, tmp_path, capsys):
    """To its end, with the text that it writes; converted from there; what the storage refuses is one line before any step."""
    sizes = {"layers": 2, "embed": 16, "heads": 4, "kv": 2, "mlp": 24, "vocab": 264, "context": 64}
    more = {"data.source": functions / "train", "data.tokenizer": "byte", "data.seq": 16, "training.steps": 2}
    more |= {f"model.overrides.{key}": value for key, value in sizes.items()} | {"checkpoint.interval": 1}
    words = ["train", "debug", *(f"--{key}={value}" for key, value in more.items())]
    assert cli.main([*words, f"--run.dir={tmp_path / 'run'}", f"--checkpoint.folder={url}"]) == 0
    assert (tmp_path / "run/sample.txt").is_file()
    fetched, get_file = [], remote.RemoteStore._fetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote.RemoteStore, "_fetch", lambda *given: (fetched.append(given[1]), get_file(*given)))
        assert cli.main(["convert", url, str(tmp_path / "hf")]) == 0
    assert fetched == ["rank-00000.safetensors"] and (tmp_path / "hf/model.safetensors").is_file()  # once, not once a tensor
    capsys.readouterr()
    bucket, _, rest = url.removeprefix("s3://").partition("/")
    for command, said in (
        ([*words, f"--checkpoint.folder={url}", "--run.fresh=true"], f"run.fresh: {url} holds checkpoints, up to step-"),
        ([*words, f"--checkpoint.folder=s3://no{bucket}/x"], f"s3://no{bucket}/x: there is no bucket no{bucket}"),
        ([*words, "--checkpoint.folder=s4://x/y"], "s4://x/y: Protocol not known: s4; an address is s3://bucket/folder"),
        ([*words, f"--checkpoint.resume={url}/step-00000007"], "step-00000007: beside it the nearest is step-00000002"),
        (["train", f"{url}/step-00000001"], f"{url}/step-00000001 is not the last of its run: name a new --checkpoint.folder"),
    ):
        assert cli.main([*command, *([] if "run.dir" in str(command) else [f"--run.dir={tmp_path / 'other'}"])]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert not (tmp_path / "other/metrics.jsonl").exists() and not (tmp_path / "other/config.toml").exists()


def test_what_the_storages_client_raises_names_the_address():
    from botocore.exceptions import NoCredentialsError

    class Client:
        url = "s3://b/run"

    def fails(error):
        def method(self):
            raise error
        return remote.told(method)

    for error, said in ((NoCredentialsError(), "s3://b/run: Unable to locate credentials"),
                        (OSError("no such bucket"), "s3://b/run: no such bucket")):
        with pytest.raises(OSError, match=said):
            fails(error)(Client())
    for error in (ValueError("s"), OSError("s3://b/run is not what was written"), KeyError("x")):
        with pytest.raises(type(error)) as raised:
            fails(error)(Client())
        assert raised.value is error
