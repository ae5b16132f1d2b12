"""Tokenizers as people have them, in folders as transformers reads them."""

import json
from pathlib import Path

from samples import TEXTS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PROBES = [
    *TEXTS[:20],
    "Hello World",
    "  two leading spaces",
    "def f(x):\n    if x:\n\treturn  1\n\n\n    # done  ",
    "\tindented\t\ttabs",
    "\n\nnewlines\n",
    "中文 text, ñ and 🙂",
    "a<|im_start|>user\nhi<|im_end|> b<|im_end|><|im_end|>",
    "<|im_start|>",
    "x<s> y</s>z",
    "a <|im_end|> b  <|im_start|>  c",
    "[PAD] x",
    " ",
    "",
]
CHINESE = ["中文分词模型的训练与扩展", "模型的训练需要大量的中文文本", "扩展词表以后中文文本更短"] * 20
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}


def byte_bpe(texts=TEXTS, size=400, special=()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def with_template(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def folder(path: Path, tokenizer: Tokenizer | None = None, **files) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        tokenizer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def pieces(path: Path, texts=TEXTS, size=420, **changes) -> int:
    """A sentencepiece model in a folder. Returns its number of pieces."""
    import sentencepiece

    path.mkdir(parents=True, exist_ok=True)
    options = {
        "vocab_size": size,
        "model_type": "bpe",
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    } | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
        model_prefix=str(path / "tokenizer"),
        **options,
    )
    (path / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")).vocab_size()


def llama3(path: Path) -> Path:
    """Llama 3's layout: special tokens stand behind the vocabulary, as added tokens only."""
    tokenizer = byte_bpe()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(10))])
    with_template(tokenizer, "<|begin_of_text|>")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    folder(path, tokenizer, tokenizer_config=FAST | names)
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def inside(path: Path) -> Path:
    """Special tokens are the vocabulary's first entries."""
    tokenizer = with_template(byte_bpe(special=["<s>", "</s>"]), "<s>")
    return folder(path, tokenizer, tokenizer_config=FAST | {"bos_token": "<s>", "eos_token": "</s>"})


def both(path: Path) -> Path:
    """Some inside, some behind; one of them is no special token."""
    tokenizer = byte_bpe(special=["<s>", "</s>"])
    tokenizer.add_tokens(["<think>", AddedToken("<|im_end|>", special=True)])
    return folder(path, with_template(tokenizer, "<s>"), tokenizer_config=FAST | {"eos_token": "<|im_end|>"})


def with_gaps(path: Path) -> Path:
    """Ids that nothing has, in the middle and before the added tokens."""
    folder(path, byte_bpe(special=["</s>"]), tokenizer_config=FAST | {"eos_token": "</s>"})
    content = json.loads((path / "tokenizer.json").read_text())
    entries = content["model"]["vocab"]
    last = max(entries, key=entries.get)
    entries[last] += 7
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def string_merges(path: Path) -> Path:
    """The older form: merges as "left right"."""
    inside(path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def eos_in_the_map(path: Path) -> Path:
    """EOS is named by special_tokens_map.json alone, while a name that one would guess is there too."""
    tokenizer = byte_bpe(special=["<|end_of_text|>"])
    tokenizer.add_special_tokens(["<|im_end|>"])
    return folder(path, tokenizer, tokenizer_config=FAST, special_tokens_map={"eos_token": "<|im_end|>"})


def eos_in_the_map_as_a_table(path: Path) -> Path:
    tokenizer = byte_bpe(special=["<|end_of_text|>"])
    tokenizer.add_special_tokens(["<|im_end|>"])
    table = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return folder(path, tokenizer, tokenizer_config=FAST, special_tokens_map={"eos_token": table})


def added_beside(path: Path) -> Path:
    """tokenizer_config.json's added_tokens_decoder names tokens that tokenizer.json lacks."""
    tokenizer = byte_bpe(special=["<|end_of_text|>"])
    number = tokenizer.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    more = {str(number): {"content": "<|im_start|>", **flags}, str(number + 1): {"content": "<|im_end|>", **flags}}
    return folder(path, tokenizer, tokenizer_config=FAST | {"eos_token": "<|im_end|>", "added_tokens_decoder": more})


def without_a(path: Path) -> Path:
    """DNA: no letter a, no unknown token."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5, "N": 6}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    with_template(tokenizer, "<s>")
    return folder(path, tokenizer, tokenizer_config=FAST | {"bos_token": "<s>", "eos_token": "</s>"})


def llama2(path: Path) -> Path:
    pieces(path)
    return folder(path, tokenizer_config=LLAMA)


def llama2_legacy(path: Path) -> Path:
    pieces(path)
    return folder(path, tokenizer_config=LLAMA | {"legacy": True})


def without_prefix(path: Path) -> Path:
    pieces(path)
    return folder(path, tokenizer_config=LLAMA | {"add_prefix_space": False})


def chatml_on_llama2(path: Path) -> Path:
    """added_tokens.json beside a sentencepiece model; EOS is one of them."""
    number = pieces(path)
    named = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    added = {"<|im_start|>": number, "<|im_end|>": number + 1}
    return folder(
        path, tokenizer_config=LLAMA | {"eos_token": "<|im_end|>"}, added_tokens=added, special_tokens_map=named
    )


def vicuna(path: Path) -> Path:
    """One padding token behind the pieces; EOS stays the model's."""
    number = pieces(path)
    return folder(path, tokenizer_config=LLAMA, added_tokens={"<pad>": number})


def user_defined(path: Path) -> Path:
    pieces(path, user_defined_symbols=["<|user|>", "<|im_end|>"])
    return folder(path, tokenizer_config=LLAMA)


def whitespace_pieces(path: Path) -> Path:
    pieces(path, texts=[*TEXTS, "        x\n    y\n" * 30], allow_whitespace_only_pieces=True)
    return folder(path, tokenizer_config=LLAMA)


IM = {"<|im_start|>": 0, "<|im_end|>": 1}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def llama2_file(path: Path, texts=TEXTS, more: bool = False, **config) -> Path:
    """Llama 2's tokenizer.json; with `more`, ChatML's tokens in added_tokens.json and EOS in special_tokens_map.json alone."""
    from megacpt.data.pieces import ranked_merges, read_model

    pieces(path, texts)
    vocabulary = {piece.piece: i for i, piece in enumerate(read_model(path / "tokenizer.model").pieces)}
    (path / "tokenizer.model").unlink()
    model = models.BPE(vocabulary, ranked_merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    side = {}
    if more:
        side["added_tokens"] = {token: len(vocabulary) + i for token, i in IM.items()}
        side["special_tokens_map"] = {"eos_token": "<|im_end|>"}
    return folder(path, with_template(tokenizer, "<s>"), tokenizer_config=LLAMA | config, **side)


def llama2_file_legacy(path: Path) -> Path:
    return llama2_file(path, legacy=True)


def llama2_file_as_written(path: Path) -> Path:
    return llama2_file(path, tokenizer_class="PreTrainedTokenizerFast")


def chatml_on_llama2_file(path: Path) -> Path:
    return llama2_file(path, more=True)


def map_over_config(path: Path) -> Path:
    """Both name an EOS: special_tokens_map.json wins."""
    tokenizer = byte_bpe(special=["<|end_of_text|>", "<|im_end|>"])
    named = {"eos_token": "<|im_end|>"}
    return folder(path, tokenizer, tokenizer_config=FAST | {"eos_token": "<|end_of_text|>"}, special_tokens_map=named)


def config_over_map(path: Path) -> Path:
    """Where tokenizer_config.json has ids of its added tokens, the map does not count."""
    tokenizer = byte_bpe(special=["<|end_of_text|>", "<|im_end|>"])
    decoder = {str(i): {"content": token, **FLAGS} for i, token in enumerate(("<|end_of_text|>", "<|im_end|>"))}
    config = FAST | {"eos_token": "<|end_of_text|>", "added_tokens_decoder": decoder}
    return folder(path, tokenizer, tokenizer_config=config, special_tokens_map={"eos_token": "<|im_end|>"})


def named_without_an_id(path: Path) -> Path:
    """Tokens that are named and nowhere in the vocabulary: they come behind it."""
    config = FAST | {"eos_token": "</s>", "pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>"]}
    return folder(path, byte_bpe(special=["</s>"]), tokenizer_config=config)


def other_flags(path: Path) -> Path:
    """tokenizer_config.json lets a token take the spaces around it."""
    tokenizer = byte_bpe(special=["<|end_of_text|>", "<|im_end|>"])
    decoder = {
        "0": {"content": "<|end_of_text|>", **FLAGS},
        "1": {"content": "<|im_end|>", **FLAGS, "lstrip": True, "rstrip": True},
    }
    return folder(
        path, tokenizer, tokenizer_config=FAST | {"eos_token": "<|end_of_text|>", "added_tokens_decoder": decoder}
    )


def split_special(path: Path) -> Path:
    """Special tokens in a text are text."""
    tokenizer = byte_bpe(special=["<|end_of_text|>", "<|im_end|>"])
    return folder(
        path, tokenizer, tokenizer_config=FAST | {"eos_token": "<|end_of_text|>", "split_special_tokens": True}
    )


def bos_and_eos_in_the_template(path: Path) -> Path:
    tokenizer = byte_bpe(special=["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return folder(path, tokenizer, tokenizer_config=FAST | {"bos_token": "<s>", "eos_token": "</s>"})


def eos_in_the_template(path: Path) -> Path:
    tokenizer = byte_bpe(special=["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return folder(path, tokenizer, tokenizer_config=FAST | {"bos_token": "<s>", "eos_token": "</s>"})


def llama2_without_bos(path: Path) -> Path:
    """No add_bos_token: transformers 5 adds none."""
    pieces(path)
    return folder(path, tokenizer_config={key: value for key, value in LLAMA.items() if key != "add_bos_token"})


def pieces_as_another_class(path: Path) -> Path:
    """PreTrainedTokenizerFast of a sentencepiece model puts no space before the text."""
    pieces(path)
    return folder(path, tokenizer_config=FAST | {"bos_token": "<s>", "eos_token": "</s>"})


def pieces_and_names_without_an_id(path: Path) -> Path:
    pieces(path)
    return folder(path, tokenizer_config=LLAMA | {"pad_token": "[PAD]", "additional_special_tokens": list(IM)})


def pieces_and_map_over_config(path: Path) -> Path:
    number = pieces(path)
    added = {token: number + i for token, i in IM.items()}
    return folder(path, tokenizer_config=LLAMA, added_tokens=added, special_tokens_map={"eos_token": "<|im_end|>"})


def pieces_and_flags(path: Path) -> Path:
    """As transformers saves it: ids and flags in tokenizer_config.json."""
    number = pieces(path)
    decoder = {
        str(number): {"content": "<|im_start|>", **FLAGS, "lstrip": True, "rstrip": True, "special": False},
        str(number + 1): {"content": "<|im_end|>", **FLAGS, "rstrip": True, "normalized": True},
    }
    return folder(path, tokenizer_config=LLAMA | {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder})


JSON = [
    llama3, inside, both, with_gaps, string_merges, eos_in_the_map, eos_in_the_map_as_a_table, added_beside, without_a,
    map_over_config, config_over_map, named_without_an_id, other_flags, split_special, bos_and_eos_in_the_template, eos_in_the_template,
    llama2_file, llama2_file_legacy, llama2_file_as_written, chatml_on_llama2_file,
]  # fmt: skip
SENTENCEPIECE = [
    llama2, llama2_legacy, without_prefix, chatml_on_llama2, vicuna, user_defined, whitespace_pieces, llama2_without_bos,
    pieces_as_another_class, pieces_and_names_without_an_id, pieces_and_map_over_config, pieces_and_flags,
]  # fmt: skip
