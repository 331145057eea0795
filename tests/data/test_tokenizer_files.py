"""SentencePiece, tiktoken and GPT-2 files against the libraries that made them."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmegatron.data import IndexedDataset, tokenize, tokenizers

TEXTS = [f"Das ist der {i}. Satz, it's {i * 7} words — añadir 語\n\n  end <|endoftext|>" for i in range(60)]


def sentencepiece(folder: Path) -> Path:
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=120, model_type="bpe", byte_fallback=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"


def tiktoken(folder: Path, name: str = "own") -> Path:
    ranks = [bytes([i]) for i in range(256)] + [b"is", b"it", b" words", b"wo", b" w", b"or", b"ds", b" wo"]
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(ranks)]
    (folder / f"{name}.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder / f"{name}.tiktoken"


def gpt2(folder: Path) -> Path:
    trained = tokenizers.train_bpe(TEXTS, 300)
    trained.inner.model.save(str(folder), "gpt2")
    return folder / "gpt2-vocab.json"


def test_sentencepiece_is_its_library(tmp_path: Path) -> None:
    path = sentencepiece(tmp_path)
    library = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    own = tokenizers.load(tmp_path)  # the folder
    assert own.vocab_size == 120 and own.eod == library.eos_id() and own.token_bytes() is None
    for again in (own, pickle.loads(pickle.dumps(own))):
        assert again.encode_batch(TEXTS) == [library.encode(text) for text in TEXTS]
        assert again.decode([*own.encode("it's"), own.eod]) == "it's"
    with pytest.raises(ValueError, match="no piece 'nope'"):
        tokenizers.load(path, "nope")


def test_tiktoken_is_its_library(tmp_path: Path) -> None:
    library = pytest.importorskip("tiktoken")
    ranks = library.load.load_tiktoken_bpe(str(tiktoken(tmp_path))) if hasattr(library, "load") else None
    own = tokenizers.load(tiktoken(tmp_path))
    assert own.vocab_size == 265 and own.eod == 264
    sizes = own.token_bytes()
    assert sizes is not None
    for text in TEXTS:
        ids = own.encode(text)
        assert own.decode([*ids, own.eod]) == text and sizes[ids].sum() == len(text.encode())
        assert pickle.loads(pickle.dumps(own)).encode(text) == ids
        if ranks:
            oracle = library.Encoding("x", pat_str=own.parts[1], mergeable_ranks=ranks, special_tokens={})
            assert ids == oracle.encode(text, disallowed_special=())
    assert tokenizers.load(tiktoken(tmp_path, "o200k_base")).eod == 199999


def test_patterns_are_tiktokens_own() -> None:
    import inspect

    public = pytest.importorskip("tiktoken_ext.openai_public")
    from fmegatron.data.tokenizer_files import CL100K, O200K

    assert CL100K in inspect.getsource(public.cl100k_base)
    assert all(part in inspect.getsource(public.o200k_base) for part in O200K.split("|")[:1])


def test_gpt2_is_transformers(tmp_path: Path) -> None:
    vocab = gpt2(tmp_path)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(str(vocab), str(tmp_path / "gpt2-merges.txt"))
    own = tokenizers.load(vocab)
    assert own.eod == theirs.convert_tokens_to_ids("<|endoftext|>")
    for text in (text.replace("<|endoftext|>", "") for text in TEXTS):
        assert own.encode(text) == theirs.encode(text) and own.decode(own.encode(text)) == text
    assert own.eod not in own.encode(TEXTS[0])
    assert tokenizers.load(tmp_path / "gpt2-merges.txt").encode("it") == own.encode("it")
    (tmp_path / "gpt2-merges.txt").unlink()
    with pytest.raises(ValueError, match="gpt2-merges.txt is missing: GPT-2's tokenizer is two files"):
        tokenizers.load(vocab)


@pytest.mark.parametrize("make", [sentencepiece, tiktoken, gpt2])
def test_workers_can_have_them(tmp_path: Path, make: object) -> None:
    assert callable(make)
    path = make(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    own = tokenizers.load(path)
    tokenize([tmp_path / "x.jsonl"], tmp_path / "out", path, append_eod=True, workers=2)
    assert [t.tolist() for t in IndexedDataset(tmp_path / "out")] == [[*own.encode(text), own.eod] for text in TEXTS * 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.model", b"nonsense", "x.model is not a SentencePiece model"),
        ("x.tiktoken", b"aGk= 0\n%%% 1\n", "x.tiktoken:2: not a token in base64"),
        ("x.tiktoken", b"", "x.tiktoken: no token in it"),
        ("vocab.json", b"{", "merges.txt is missing"),
        ("x.json", b"{}", "x.json is not a tokenizer"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path / name)


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = tiktoken(tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"own needs tiktoken: pip install 'fmegatron\[data\]', or pip install tiktoken"):
        tokenizers.load(path)


def test_padded_vocabulary() -> None:
    assert list(map(tokenizers.padded_vocab, (1, 128, 129, 50257))) == [128, 128, 256, 50304]
    assert tokenizers.padded_vocab(50257, 128 * 8) == 51200
    with pytest.raises(ValueError, match="vocabulary 0"):
        tokenizers.padded_vocab(0)


def tokenizer_json(folder: Path) -> Path:
    tokenizers.train_bpe(TEXTS, 300).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


MAKERS = {"sentencepiece": sentencepiece, "tiktoken": tiktoken, "gpt2": gpt2, "tokenizer.json": tokenizer_json}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """{kind: (what is loaded, the bytes of its files)}."""
    made = {}
    for kind, make in MAKERS.items():
        folder = tmp_path_factory.mktemp("whole")
        path = make(folder)
        made[kind] = path, {file.name: file.read_bytes() for file in folder.iterdir()}
    return made


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(sorted(MAKERS)), st.integers(0), st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.booleans())
def test_cut_files_are_refused_and_flipped_ones_refused_or_whole_tokenizers(whole, kind, which, share, bit, cuts):
    path, files = whole[kind]
    name = sorted(files)[which % len(files)]
    data = bytearray(files[name])
    at = int(share * len(data))
    if cuts:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    path.with_name(name).write_bytes(data)
    try:
        own = tokenizers.load(path)
    except ValueError as error:
        assert "\n" not in str(error) and (name in str(error) or path.name in str(error))
        return
    finally:
        path.with_name(name).write_bytes(files[name])
    # A .tiktoken file does not say how many tokens it has: cut at the end of a line behind all bytes, it is another's.
    assert not cuts or (kind == "tiktoken" and files[name][at - 1 : at + 1].count(b"\n") and own.vocab_size > 256)
    for text in TEXTS[:3]:
        ids = own.encode(text)
        assert all(0 <= i < own.vocab_size for i in ids) and isinstance(own.decode(ids), str)


@pytest.mark.parametrize("kind", MAKERS)
def test_another_kind_of_file_under_the_name_is_refused(whole, kind):
    path, files = whole[kind]
    for other, (theirs, content) in whole.items():
        if other != kind:
            path.write_bytes(content[theirs.name])
            with pytest.raises(ValueError, match=f"{path.name}|vocab.json") as caught:
                tokenizers.load(path)
            assert "\n" not in str(caught.value)
    path.write_bytes(files[path.name])
