import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from samples import TEXTS
from shared import wait_until

import megacpt.data.join as join_module
import megacpt.data.prepare as module
import megacpt.data.text as text_module
from megacpt.data.indexed import IndexedDataset
from megacpt.data.join import adopt
from megacpt.data.manifest import expand_paths, read_manifest
from megacpt.data.prepare import Options, prepare
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError, DataError


@pytest.fixture
def options(tokenizer_dir):
    return Options(str(tokenizer_dir))


def jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def documents(prefix) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data.read(i, 0, int(data.lengths[i])).tolist() for i in range(data.num_documents)]


def expected(options, texts=TEXTS) -> list[list[int]]:
    return [[*ids, 0] for ids in Tokenizer(options.tokenizer).encode_batch([t for t in texts if t])]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 4 KB, which this process cuts and the workers only read."""
    monkeypatch.setattr(text_module, "MIN_PIECE_BYTES", 4096)


def write_inputs(folder):
    folder.mkdir()
    jsonl(folder / "0.jsonl", TEXTS[:100])
    with gzip.open(folder / "1.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t, "more": 1}) + "\n" for t in TEXTS[100:150])
    (folder / "2.jsonl.zst").write_bytes(
        zstandard.compress(open(jsonl(folder / "x.jsonl", TEXTS[150:200]), "rb").read())
    )
    os.remove(folder / "x.jsonl")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[200:300]}), folder / "3.parquet", row_group_size=7)
    for i, text in enumerate(TEXTS[300:320]):
        (folder / f"4-{i:03d}.txt").write_text(text)
    with gzip.open(folder / "5.txt.gz", "wt") as file:
        file.write(TEXTS[320])


def test_every_format_in_the_order_of_the_input(tmp_path, options, small_pieces):
    write_inputs(tmp_path / "in")
    manifest = prepare([str(tmp_path / "in")], str(tmp_path / "deep/er/out"), options, workers=2)
    assert documents(tmp_path / "deep/er/out") == expected(options, TEXTS[:321])
    assert manifest == read_manifest(str(tmp_path / "deep/er/out"))
    assert manifest["documents"] == 321 and manifest["eos_token_id"] == 0 and manifest["dtype"] == "uint16"
    lengths = [len(d) for d in documents(tmp_path / "deep/er/out")]
    counted = {int(k): v["documents"] for k, v in manifest["length_histogram"].items()}
    assert counted == {1 << k: n for k in range(20) if (n := sum(1 << k <= x < 2 << k for x in lengths))}
    assert not list(tmp_path.rglob("*.parts"))


def test_the_number_of_workers_does_not_show(tmp_path, options, small_pieces):
    source = jsonl(tmp_path / "t.jsonl")
    for workers in (1, 3):
        prepare([source], str(tmp_path / str(workers)), options, workers=workers)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"3.{kind}").read_bytes()


def test_parts_together_are_the_whole(tmp_path, options, small_pieces):
    source = jsonl(tmp_path / "t.jsonl")
    for i in range(11):
        prepare([source], str(tmp_path / "p"), options, workers=1, part=(i, 11))
    prefixes = expand_paths([str(tmp_path / "p-*")])
    assert [p[-5:] for p in prefixes] == [f"{i:05d}" for i in range(11)]
    assert [d for p in prefixes for d in documents(p)] == expected(options)


def test_globs_are_in_numeric_order(tmp_path):
    for name in ("a-10", "a-2", "a-1"):
        (tmp_path / f"{name}.idx").touch()
    assert [p.rsplit("/")[-1] for p in expand_paths([str(tmp_path / "a-*")])] == ["a-1", "a-2", "a-10"]
    with pytest.raises(DataError, match="no prepared data"):
        expand_paths([str(tmp_path / "b-*")])


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{broken", "not valid JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"body": "x"}', "has no field 'text'; its fields are 'body'"),
        (b'["x"]', "is a list, not an object"),
        (b'{"text": 3}', "field 'text' is a int, not a string"),
        (b'{"text": "\\ud800"}', "invalid Unicode"),
    ],
)
def test_a_bad_line_is_counted_and_shown_then_too_many_are_an_error(
    tmp_path, options, small_pieces, line, reason, capsys
):
    lines = open(jsonl(tmp_path / "t.jsonl"), "rb").read().splitlines()
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([*lines[:300], line, *lines[300:]]) + b"\n")
    manifest = prepare([str(tmp_path / "t.jsonl")], str(tmp_path / "o"), options, workers=1)
    assert manifest["bad_lines"] == 1 and documents(tmp_path / "o") == expected(options)
    assert f"t.jsonl:301: {reason}" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"1 records could not be read, more than --max-bad-lines 0:\n.*t.jsonl:301: "):
        prepare([str(tmp_path / "t.jsonl")], str(tmp_path / "o2"), replace(options, max_bad_lines=0), workers=1)
    assert not list(tmp_path.glob("o2.*in")) and not list(tmp_path.glob("o2.json"))


def test_empty_files_and_empty_documents(tmp_path, options, capsys):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="hold no documents"):
        prepare([str(tmp_path / "empty.jsonl")], str(tmp_path / "o"), options, workers=1)
    source = jsonl(tmp_path / "t.jsonl", ["a", "", "b"])
    manifest = prepare([source, str(tmp_path / "empty.jsonl")], str(tmp_path / "o"), options, workers=1)
    assert (manifest["documents"], manifest["empty_documents"]) == (2, 1)
    assert "empty.jsonl: is empty" in capsys.readouterr().err


def test_arguments_that_cannot_be_right(tmp_path, options):
    source = jsonl(tmp_path / "t.jsonl", ["a"])
    (tmp_path / "odd.xyz").touch()
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*no such file(.|\n)*odd.xyz: unknown kind"):
        prepare([str(tmp_path / "none"), str(tmp_path / "odd.xyz")], str(tmp_path / "o"), options)
    prepare([source], str(tmp_path / "o"), options, workers=1)
    with pytest.raises(ConfigError, match="exists. Give another --output, or --overwrite"):
        prepare([source], str(tmp_path / "o"), options, workers=1)
    prepare([source], str(tmp_path / "o"), options, workers=1, overwrite=True)
    with pytest.raises(ConfigError, match="holds neither"):
        prepare([source], str(tmp_path / "o3"), replace(options, tokenizer=str(tmp_path)))
    with pytest.raises(ConfigError, match="--eos-token <x>: is not in the vocabulary"):
        prepare([source], str(tmp_path / "o3"), replace(options, eos_token="<x>"))


def test_a_missing_column_names_those_there_are(tmp_path, options):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="has no column 'text'; its columns are body"):
        prepare([str(tmp_path / "t.parquet")], str(tmp_path / "o"), options, workers=1)


@pytest.mark.parametrize(
    "name, content", [("t.jsonl.gz", b"\x1f\x8b broken"), ("t.jsonl.zst", b"no zstd"), ("t.parquet", b"PAR1")]
)
def test_damaged_archives_are_named(tmp_path, options, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        prepare([str(tmp_path / name)], str(tmp_path / "o"), options, workers=1)


def test_an_id_beyond_the_vocabulary_is_shown_with_its_document(tmp_path, options):
    source = jsonl(tmp_path / "t.jsonl", ["fine", "def return"])
    with pytest.raises(
        DataError, match="token id .* is outside the vocabulary of 20 entries, in the document that begins"
    ):
        prepare([source], str(tmp_path / "o"), replace(options, vocab_size=20), workers=1)


def test_bos_as_the_tokenizer_adds_it_and_both_switches(tmp_path, options, tokenizer_dir):
    from tokenizers import Tokenizer as HF
    from tokenizers.processors import TemplateProcessing

    tokenizer = HF.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = jsonl(tmp_path / "t.jsonl", ["data"])
    with_bos = replace(options, tokenizer=str(tmp_path / "tokenizer.json"))
    plain = tokenizer.encode("data", add_special_tokens=False).ids
    for changes, ids in (({}, [bos, *plain, 0]), ({"bos": False}, [*plain, 0]), ({"eos": False}, [bos, *plain])):
        prepare([source], str(tmp_path / "o"), replace(with_bos, **changes), workers=1, overwrite=True)
        assert documents(tmp_path / "o") == [ids]


def test_sentencepiece(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    source = jsonl(tmp_path / "t.jsonl", TEXTS[:20])
    prepare([source], str(tmp_path / "o"), Options(str(tmp_path / "tokenizer.model")), workers=1)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert documents(tmp_path / "o") == [[pieces.bos_id(), *pieces.encode(t), pieces.eos_id()] for t in TEXTS[:20]]


def test_gigatoken_gives_the_same_ids_or_stops(tmp_path, options, monkeypatch):
    gigatoken = pytest.importorskip("gigatoken", reason="needs the optional package gigatoken")
    source = jsonl(tmp_path / "t.jsonl")
    prepare([source], str(tmp_path / "o"), replace(options, engine="gigatoken"), workers=1)
    assert documents(tmp_path / "o") == expected(options)
    fast = module.FastTokenizer(Tokenizer(options.tokenizer))
    monkeypatch.setattr(
        fast, "_fast", type("Wrong", (), {"encode_batch_list": lambda self, texts: [[1]] * len(texts)})()
    )
    with pytest.raises(ConfigError, match="its ids differ"):
        fast.encode_batch(["data order"])
    assert gigatoken


def test_a_killed_run_leaves_nothing_finished_and_continues(tmp_path, tokenizer_dir, monkeypatch):
    """SIGKILL once some pieces are done: no .bin, .idx or .json; the next run does the rest, with the same result."""
    source = jsonl(tmp_path / "t.jsonl", TEXTS * 40)
    script = (
        "import sys, megacpt.data.text as t; t.MIN_PIECE_BYTES = 40_000\n"
        "from megacpt.data.prepare import Options, prepare\n"
        "if __name__ == '__main__': prepare([sys.argv[1]], sys.argv[2], Options(sys.argv[3]), workers=1)\n"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py"), source, str(tmp_path / "o"), str(tokenizer_dir)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: len(list(tmp_path.glob("o.parts/0*.json"))) >= 3, alive=[process.pid])
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not [k for k in ("bin", "idx", "json") if (tmp_path / f"o.{k}").exists()]
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.glob("o.parts/0*.json")}
    assert finished
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"continuing: {len(finished)} of" in done.stderr
    monkeypatch.setattr(text_module, "MIN_PIECE_BYTES", 1 << 20)
    prepare([source], str(tmp_path / "whole"), Options(str(tokenizer_dir)), workers=1)
    assert (tmp_path / "o.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_another_input_discards_the_pieces_of_the_one_before(tmp_path, options):
    parts = tmp_path / "o.parts"
    parts.mkdir()
    (parts / "plan.json").write_text("another")
    (parts / "000000.json").write_text('{"documents": 1, "tokens": 1, "empty": 0, "bad_lines": 0, "bad_examples": []}')
    prepare([jsonl(tmp_path / "t.jsonl")], str(tmp_path / "o"), options, workers=1)
    assert documents(tmp_path / "o") == expected(options)


def test_a_full_disk_is_said_and_nothing_looks_finished(tmp_path, options, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = jsonl(tmp_path / "t.jsonl")
    monkeypatch.setattr(join_module, "write_index", full)
    with pytest.raises(DataError, match="the disk is full"):
        prepare([source], str(tmp_path / "o"), options, workers=1)
    assert not [k for k in ("bin", "idx", "json") if (tmp_path / f"o.{k}").exists()]
    monkeypatch.undo()
    prepare([source], str(tmp_path / "o"), options, workers=1)
    assert documents(tmp_path / "o") == expected(options)


def test_a_full_disk_in_a_worker(tmp_path, tokenizer_dir):
    """A real limit: files above 20 KB cannot be written."""
    source = jsonl(tmp_path / "t.jsonl", TEXTS * 10)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from megacpt.cli import main; main(sys.argv[1:])"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "prepare",
        source,
        "--tokenizer",
        str(tokenizer_dir),
        "--output",
        str(tmp_path / "o"),
        "--workers",
        "1",
    ]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 76 and "the disk is full or the file too large" in out.stderr, out.stderr
    assert not [k for k in ("bin", "idx", "json") if (tmp_path / f"o.{k}").exists()]


def test_adopting_megatrons_files(tmp_path, options):
    prepare([jsonl(tmp_path / "t.jsonl")], str(tmp_path / "o"), options, workers=1)
    ours = read_manifest(str(tmp_path / "o"))
    os.remove(tmp_path / "o.json")
    with pytest.raises(DataError, match="megacpt prepare --adopt"):
        read_manifest(str(tmp_path / "o"))
    theirs = adopt(str(tmp_path / "o"), options.tokenizer)
    for key in ("documents", "tokens", "dtype", "bin", "idx", "length_histogram", "eos_token_id", "eos_appended"):
        assert theirs[key] == ours[key], key
    os.remove(tmp_path / "o.json")
    np.full(ours["tokens"], 60000, np.uint16).tofile(tmp_path / "o.bin")
    with pytest.raises(DataError, match="holds token id 60000"):
        adopt(str(tmp_path / "o"), options.tokenizer)


def test_adopting_a_set_with_empty_documents(tmp_path, options, capsys):
    """Megatron writes an empty document for an empty text: it keeps its number, is counted, and no row holds it."""
    from test_indexed import index_of

    from megacpt.data.domain import DomainData
    from megacpt.data.packing import open_index
    from megacpt.data.select import Selection

    ids = [[*Tokenizer(options.tokenizer).encode_batch([text])[0], 0] for text in TEXTS[:30]]
    lengths = [len(document) for document in ids]
    boundaries = [0, 0, *range(1, 8), 7, *range(8, 31), 30]
    (tmp_path / "o.idx").write_bytes(index_of(lengths, boundaries))
    np.concatenate(ids).astype(np.uint16).tofile(tmp_path / "o.bin")
    manifest = adopt(str(tmp_path / "o"), options.tokenizer)
    assert (manifest["documents"], manifest["empty_documents"], manifest["eos_appended"]) == (33, 3, True)
    said = capsys.readouterr().err
    assert "3 of 33 documents hold no token" in said and "do not end with" not in said
    empty = [0, 8, 32]
    assert [i for i, document in enumerate(documents(tmp_path / "o")) if not document] == empty
    assert [document for document in documents(tmp_path / "o") if document] == ids
    index = open_index(
        DomainData([str(tmp_path / "o")]), Selection(64, "best_fit", 0, 2**31, 0, False), str(tmp_path / "p")
    )
    pieces = [piece for row in range(index.num_rows) for piece in index.row(row)]
    trained = {document for document, _, length in pieces if length}
    assert all(length > 0 for *_, length in pieces) and not trained & set(empty)
    assert sum(length for *_, length in pieces) == sum(n for n in lengths if n > 1)


def test_two_at_once_on_one_output_are_refused(tmp_path, options):
    import fcntl

    (tmp_path / "o.parts").mkdir()
    with open(tmp_path / "o.parts/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another megacpt prepare is writing it"):
            prepare([jsonl(tmp_path / "t.jsonl")], str(tmp_path / "o"), options, workers=1)


def test_names_that_are_no_utf8_are_read_and_kept(tmp_path, options):
    """Written on another system: the bytes of the name come back from the manifest."""
    folder = os.path.join(os.fsencode(tmp_path), b"in")
    os.mkdir(folder)
    with open(os.path.join(folder, b"\xff\xfe caf\xe9.jsonl"), "wb") as file:
        file.write(json.dumps({"text": TEXTS[0]}).encode() + b"\n{broken\n")
    with open(os.path.join(folder, b"\xff.txt.gz"), "wb") as file:
        file.write(gzip.compress(TEXTS[1].encode()))
    with open(os.path.join(folder, b"\xff.parquet"), "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": [TEXTS[2]]}), file)
    prepare([str(tmp_path / "in")], str(tmp_path / "o"), options, workers=1)
    names = [os.fsencode(os.path.basename(source["path"])) for source in read_manifest(str(tmp_path / "o"))["sources"]]
    assert sorted(names) == [b"\xff.parquet", b"\xff.txt.gz", b"\xff\xfe caf\xe9.jsonl"]
    assert sorted(documents(tmp_path / "o")) == sorted(expected(options, TEXTS[:3]))


def test_a_folder_is_read_without_what_is_not_of_the_data(tmp_path, options, capsys):
    """Hidden folders and the card are left out, the card by name; links are followed, a folder once; a link to nothing is an error."""
    inside, beside = tmp_path / "in", tmp_path / "beside"
    for folder in (inside / "sub", inside / ".ipynb_checkpoints", inside / ".cache/huggingface", beside):
        folder.mkdir(parents=True)
    jsonl(inside / "a.jsonl", TEXTS[:2])
    jsonl(inside / "sub/b.jsonl", TEXTS[2:4])
    jsonl(beside / "c.jsonl", TEXTS[4:6])
    jsonl(inside / ".ipynb_checkpoints/a-checkpoint.jsonl", ["old"])
    (inside / ".cache/huggingface/a.jsonl.metadata").write_text("x")
    (inside / "README.md").write_text("# The card")
    (inside / "linked").symlink_to(beside)
    (inside / "linked again").symlink_to(beside)
    (inside / "sub/loop").symlink_to(inside)
    prepare([str(inside)], str(tmp_path / "o"), options, workers=1)
    read = [*TEXTS[:2], *TEXTS[4:6], *TEXTS[2:4]]
    assert documents(tmp_path / "o") == expected(options, read)
    said = capsys.readouterr().err
    assert "README.md: a description of the data, left out" in said
    assert "loop: the same folder as one that is read" in said and "linked again: the same" in said
    prepare([str(inside), str(inside / "README.md")], str(tmp_path / "o2"), options, workers=1)
    assert documents(tmp_path / "o2") == expected(options, [*read, "# The card"])
    (inside / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="gone.jsonl: a link to what is not there"):
        prepare([str(inside)], str(tmp_path / "o3"), options, workers=1)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "README.md").write_text("a text")
    (texts / "b.txt").write_text("b")
    prepare([str(texts)], str(tmp_path / "o4"), options, workers=1)
    assert documents(tmp_path / "o4") == expected(options, ["a text", "b"])
