"""Makes tests/goldens/tokenizers: small trained tokenizers and what Hugging Face gives for hard text, and chat templates.

Usage: python make_tokenizers.py OUTPUT_FOLDER        (needs tokenizers and transformers)
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_base import generate_merges
from transformers.utils.chat_template_utils import render_jinja_template

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then the other fox doesn't.",
    "it's they're we've I'm you'll he'd IT'S   three spaces\n\nnew lines\tand tabs",
    "numbers 1 12 123 1234 2024 3.14159 and 100,000", "def f(x):\n    return x ** 2\n",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f",
    "the theory of the thing there then them these those this that", " hello world hello there  world",
] * 4
LINES = [
    "", "hello world", " hello", "  hello  world  ", "Hello, world! It's 2024; they'll've can't WE'RE I'M",
    "\t\ttabs\tand\nnew\n\nlines\r\nCRLF\rlone CR\x0b\x0c", "a\u00a0b\u00a0\u00a0c", "\u3000\u5168\u89d2\u3000x",
    "\u2003em\u2009thin\u200bzw\u200dj\ufeffbom\u180emvs",
    "e\u0301 \u00e9 \u1e9b\u0323 A\u030a \u00c5 \u212b \uac00\u11a8 \u1100\u1161\u11a8", "a\u0315\u0300\u05aeb \u0308\u0301x q\u0323\u0307",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f\u200d\U0001f525",
    "\u6f22\u5b57\u3068\u3072\u3089\u304c\u306a\ud55c\uad6d\uc5b4\u4e2d\u6587,mix", "\u0645\u0631\u062d\u0628\u0627 123 \u05e9\u05dc\u05d5\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22", "\u0660\u0661\u0662 \u0966\u0967 \u2163 \u00bd\u00b2 \u2460\u2461 \U0001d7d8 \u3007\u4e00",
    "\ufb01 \ufb02 \ufb06 \u017f \u212a \u00c5 \u00df \u1e9e \u0130 \u0131 \u01c5", "\x00nul\x00\x01\x7f\x85\x9f",
    "\ue000\U000f0000 private \ufffd\uffff\U0010ffff", "12345 3.14159 0x1F  12   7 1a2b3", "      x", "trailing   ",
    "x" * 70, "the" * 30 + " " + "\u00e9" * 20, "!!!???...---***&&&", "$100 + 50% = \u20ac150", "don\u2019t 'tis 's'S 'LL \u017fs'\u017f",
    "<s> </s> <unk> <|im_start|>user\nhi<|im_end|>\n <|end|>x<|end|>", "<s>hello</s> world<s>", "\u2581 \u2581\u2581a \u2581b", "\u0120 \u010a",
    "<0x0A><0xE4>", "<|im_start|><|im_start|> <|im_end|", "\r\n\r\n\r\r\n \n \n  x", "\u2028line\u2029para",
    "\u0300\u0301 first", "\U0001d518\U0001d52b \U00020000 \U0001f004", "\u0345\u0301\u0315 \u1df6\u0316 \U00011935\U00011930",
    "\u0e33 \u0f73 \u0344 \u0958", "one <w> two<w> <w>three x<w>x", "a  <L>b <R>  c <LR> d", "a <norm> B <NORM>  \u00c9<nOrm>",
    "<pre><prefix> <prefix", "q\u00a0<L>\u2003<R>\u3000z", "mixed \uff26\uff35\uff2c\uff2c \uff76\uff80", " lead <s> mid  <s>  tail ",
]
GPT2 = dict(add_prefix_space=False, use_regex=True)
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|end|>"]


def special(names):
    return [AddedToken(name, special=True, normalized=False) for name in names]


def split(expression, behavior="isolated"):
    return pre_tokenizers.Split(Regex(expression), behavior)


def bytes_only():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def template(single):
    return processors.TemplateProcessing(single=single, pair=None, special_tokens=[("<s>", 0), ("</s>", 1)])


def byte_level(pre_tokenizer, normalizer=None, size=400, post=None, ignore_merges=False):
    """A byte-level BPE; special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    if ignore_merges:  # a token that no merge makes shows whether the option is heeded
        data = json.loads(tokenizer.to_str())
        data["model"]["ignore_merges"] = True
        data["model"]["vocab"]["\u0120hello"] = data["model"]["vocab"].get("\u0120hello", len(data["model"]["vocab"]))
        data["model"]["vocab"]["\u0120lazy\u0120"] = len(data["model"]["vocab"])
        data["model"]["vocab"]["mixed"] = len(data["model"]["vocab"])
        tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens(special(SPECIAL))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post or processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentencepiece(byte_fallback, normalizer, pre_tokenizer, decoder, fuse_unk=True, post="<s> $A"):
    """A SentencePiece-style BPE whose merges follow from scores, as Hugging Face converts such models."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[:4] + CORPUS[5:], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    pieces = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    names = ["<s>", "</s>", "<unk>"] + ([f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else [])
    vocabulary = {token: index for index, token in enumerate(names + pieces)}
    scores = {token: 0.0 if index < len(names) else -float(index - len(names)) for token, index in vocabulary.items()}
    merges = generate_merges(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=fuse_unk, byte_fallback=byte_fallback))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(special(["<s>", "</s>", "<unk>"]))
    tokenizer.post_processor = template(post)
    return tokenizer


def llama_decoder():
    return decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def odd_added_tokens():
    """Every flag of added tokens, and normalizers that change what they look like."""
    tokenizer = byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation("merged_with_next"), pre_tokenizers.ByteLevel(add_prefix_space=True)]),
        normalizers.Sequence([normalizers.Strip(left=True, right=False), normalizers.NFKD(), normalizers.StripAccents(),
                              normalizers.Lowercase(), normalizers.Replace(Regex(r"\s{2,}"), " ")]))
    tokenizer.add_tokens([
        AddedToken("<w>", single_word=True, normalized=False), AddedToken("<L>", lstrip=True, normalized=False),
        AddedToken("<R>", rstrip=True, normalized=False), AddedToken("<LR>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("<Norm>", normalized=True), AddedToken("<pre>", normalized=True), AddedToken("<prefix>", normalized=True),
    ])
    tokenizer.post_processor = template("<s> $A </s>")
    return tokenizer


def styles():
    mistral = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    always = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    never = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="never")])
    behaviors = pre_tokenizers.Sequence([
        split(r"\p{Han}+", "removed"), split(r"[aeiou]", "merged_with_previous"), split(r"\d", "contiguous"),
        split(r"\w+|[^\w\s]", "isolated"), pre_tokenizers.Digits(individual_digits=False), bytes_only()])
    prepend = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    yield "gpt2", byte_level(pre_tokenizers.ByteLevel(**GPT2))
    yield "llama3", byte_level(pre_tokenizers.Sequence([split(LLAMA3), bytes_only()]), ignore_merges=True,
                               post=processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<s> $A")]))
    yield "qwen", byte_level(pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), bytes_only()]), normalizers.NFC())
    yield "smollm", byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(**GPT2)]))
    yield "behaviors", byte_level(behaviors, size=330)
    yield "added", odd_added_tokens()
    yield "llama", sentencepiece(True, prepend, None, llama_decoder())
    yield "mistral", sentencepiece(True, None, mistral, llama_decoder(), post="<s> $A </s>")
    yield "metaspace", sentencepiece(False, normalizers.NFKC(), always, decoders.Metaspace(prepend_scheme="always"))
    yield "unknown", sentencepiece(False, None, never, decoders.Metaspace(prepend_scheme="never"), fuse_unk=False)


def write(path, data):
    path.write_text(json.dumps(data, ensure_ascii=True, separators=(",", ":")) + "\n")


def write_style(folder, tokenizer):
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    ids, texts, skipped = [], [], []
    for line in LINES:
        plain = tokenizer.encode(line, add_special_tokens=False).ids
        whole = tokenizer.encode(line).ids
        ids.append(plain)
        text = tokenizer.decode(whole, skip_special_tokens=False)
        without = tokenizer.decode(whole, skip_special_tokens=True)
        texts.append(text)
        skipped.append(None if without == text else without)
    empty = tokenizer.encode("").ids
    one = tokenizer.encode("hello").ids
    inner = tokenizer.encode("hello", add_special_tokens=False).ids
    start = next(i for i in range(len(one)) if one[i:i + len(inner)] == inner)
    assert empty == one[:start] + one[start + len(inner):]
    # Bytes that are no UTF-8, cut characters and special tokens in the middle.
    loose = [list(range(i, tokenizer.get_vocab_size(), 37)) for i in (0, 5, 11)]
    write(folder / "expected.json", dict(
        before=one[:start], after=one[start + len(inner):], ids=ids, texts=texts, skipped=skipped, loose=loose,
        loose_texts=[tokenizer.decode(ids, skip_special_tokens=False) for ids in loose]))


CHAT = Path(__file__).parent / "tokenizers" / "chat_cases.json"


def write_chats(path):
    """Renders every case of chat_cases.json (templates and messages, written by hand)."""
    cases = json.loads(CHAT.read_text())
    out = []
    for case in cases["cases"]:
        options = dict(case.get("variables", {}), bos_token="<s>", eos_token="</s>")
        tools = options.pop("tools", None)
        try:
            rendered, _ = render_jinja_template(
                [case["messages"]], tools=tools, chat_template=cases["templates"][case["template"]],
                add_generation_prompt=case["prompt"], **options)
            text = rendered[0]
        except Exception as error:  # the template itself refuses, or Jinja does
            text = None
            print(case["template"], "->", type(error).__name__, error)
        out.append(text)
    write(path, out)


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "lines.json", LINES)
    for name, tokenizer in styles():
        write_style(folder / name, tokenizer)
    write_chats(folder / "chats.json")


if __name__ == "__main__":
    main()
