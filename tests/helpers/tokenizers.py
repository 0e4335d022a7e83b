"""Small tokenizers of several kinds, each with a chat template as models of its kind have."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fst_optimizer.testing.tiny import CHAT_TEMPLATE

TEXTS = [
    "Answer the question. The user asks, the assistant answers; one two three four five.",
    "[[ ## question ## ]]\nWhat is the end? <think> about it </think> im_start im_end user assistant",
    "letters: d c b a \u00e9\u00e8\u00fc \u4f60\u597d \U0001f642 INST <s> </s> <|end|> http://a.b/c?d=e&f",
] * 4
LLAMA_LIKE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{{ message['content'] | trim }} [/INST]"
    "{% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
QWEN_LIKE = (
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEEP_LIKE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<User>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<Assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<Assistant>{% endif %}"
)


def _wrapped(tokenizer, template, special, plain=(), **names):
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    return fast


def letters():
    """The one of the shipped model: its control tokens are in its model's own vocabulary."""
    return AutoTokenizer.from_pretrained("programs/letters/model")


def byte_bpe():
    """As Qwen's: byte-level BPE, control tokens behind the vocabulary, <think> an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return _wrapped(tokenizer, QWEN_LIKE, special, ("<think>", "</think>"), eos_token="<|im_end|>")


def sentencepiece_bpe():
    """As Llama's and Mistral's first: a space before the text, spaces as U+2581, <s> and </s> in the vocabulary."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("t", "h"), ("a", "n"), ("e", "n"), ("\u2581", "a"), ("i", "n"), ("<", "s"), ("<", "/"), ("s", ">")]
    names = ["<unk>", "<s>", "</s>", *bytes_, "\u2581", *map(chr, range(33, 127)), *map("".join, merges)]
    model = models.BPE(
        vocab={name: number for number, name in enumerate(names)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _wrapped(made, LLAMA_LIKE, ("<s>", "</s>"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def marks_not_special():
    """As DeepSeek's: what marks a turn is an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    plain = ("<User>", "<Assistant>", "<tool>")
    return _wrapped(tokenizer, DEEP_LIKE, ("<bos>", "<eos>"), plain, bos_token="<bos>", eos_token="<eos>")


def stripping():
    """As Phi's: control tokens that take the white space behind them along."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    names = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, normalized=False) for name in names])
    return _wrapped(tokenizer, CHAT_TEMPLATE, (), eos_token="<|im_end|>")


def normalizing():
    """Lower case, and letters in their plain form: a name may appear only after that."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_tokens([AddedToken("<|im_start|>", normalized=True), AddedToken("<|im_end|>", normalized=True)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def unigram():
    """As T5's: its model itself makes </s> of these letters."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("\u2581", -2.0),
        *((char, -5.0) for char in "abcdefghijklmnopqrstuvwxyz<>/|_"),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    return _wrapped(tokenizer, template, ("</s>",), eos_token="</s>", unk_token="<unk>")


KINDS = (letters, byte_bpe, sentencepiece_bpe, marks_not_special, stripping, normalizing)
