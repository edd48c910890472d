"""The strings that every tokenizer golden encodes: hand-written corners, then seeded mixtures."""

import random

WORDS = (
    "the server keeps one model and many adapters in memory don't I'LL we've they're it's "
    "Lorikeet lorikeet LORIKEET batch_size snake_case camelCase HTTPServer naïve façade Ångström "
    "straße ﬁnance Ⅷ ½ x² привет мир Ελληνικά עברית שָׁלוֹם العربية ١٢٣ हिन्दी क्षेत्र ไทย ភាសាខ្មែរ "
    "日本語 カタカナ ひらがな 中文字符 한국어 ﷽ ǅ İstanbul ıI ſ Ǆungla 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐷 e\u0301 o\u0308\u0323 Z\u0351\u036b"
).split()
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\n ", "\t\t", "\u00a0", "\u2003", "\u3000",
          "\u200b", "\ufeff", "\u0085", "\x0b", "\x0c", "        ", " \t \n  "]
NUMBERS = ["0", "7", "42", "123", "1234", "2024-11-24", "3.14159", "1,000,000", "0x7fff", "1e-9", "٣", "Ⅻ", "½"]
SIGNS = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "—", "“”", "¿", "。", "！", "->", "=>", "!=", "//", "'s"]
EMOJI = ["😀", "👍🏽", "🇺🇸", "👨‍👩‍👧‍👦", "❤️", "🏳️‍🌈", "🫠", "1️⃣", "\U0001f9ff"]
CONTROL = ["\x00", "\x01", "\x04", "\x07", "\x1b[0m", "\x7f", "\x9f", "\u200d", "\u202e", "\u2066", "\ufffd", "\uffff"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<unk>",
           "[INST]", "[/INST]", "<tool_call>", "<|im_end", "<0x0A>", "<|IM_END|>", "▁", "Ġ", "<0xE2><0x82>"]

HAND = [
    "", " ", "  ", "\n", "\t", "\r", "a", "A", "0", "é", "中", "😀", "Hello, world!", " Hello", "Hello ", "  Hello  ",
    "Hello  world", "Hello   world", "1 2  3   4", "a 1", "a  1", "a   12", "  12", " 1", "12 ", "\n1", "\n\n 1", "\t42",
    "x=1", "x = 12345", "123456789012345678901234567890", "3.14", "1,234.5", "10^9", "٤٢ and ४२ and ４２", "¼½¾ ²³ ①②",
    "don't", "DON'T", "Don’t", "we'll we'Ll WE'LL", "'s 't 're 've 'm 'll 'd", "x'sy", "it'ſ 'K\u212a", "'", "''", "'S",
    "def f(x):\n    return x ** 2  # square\n", "if (a != b) {\n\treturn a->b[0] & ~0xFF;\n}\n",
    "SELECT name, COUNT(*) FROM t WHERE id >= 10 GROUP BY name;", '{"key": [1, 2.5, null, "v\\n"]}',
    "<html><body class='x'>&amp;</body></html>", "#include <vector>\n#define X(a) #a\n", "https://example.org/a?b=c&d=%20#e",
    "user@example.org", "C:\\path\\to\\file", "/usr/local/bin", "$HOME ${x} `cmd`", "a\\nb", "\\u00e9", "TODO(x): fix",
    "| a | b |\n|---|---|\n| 1 | 2 |", "- [ ] item\n  - sub\n", "***bold*** _it_ ~~no~~", "E=mc²", "∀x∈ℝ: ⌈x⌉ ≥ x", "αβγ ∑∫√",
    "€ £ ¥ ₹ ₿", "™ © ® ° № ‰", "← ↑ → ↓ ↔ ⇒", "█▓▒░ ┌─┐│└┘", "e\u0301 vs é", "A\u030a Å Å", "ﬃ ﬁ ﬂ", "①②③", "㎏ ㍿",
    "가각 가각", "\u1100\u1161\u11a8", "क्ष त्र ज्ञ", "ก็ น้ำ", "שָׁלוֹם עולם", "مرحبا بالعالم", "אבc דהf", "\u202eabc\u202c", "\u2067x\u2069",
    "日本語のテキスト、句読点。", "中文，标点！？", "한국어 문장입니다.", "𠮷野家", "𝓗𝓮𝓵𝓵𝓸", "👩🏾‍🚀🚀", "👨‍👩‍👧‍👦👨‍👩‍👧", "🇩🇪🇫🇷🇯🇵", "#️⃣*️⃣0️⃣",
    "\x00", "a\x00b", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "\ufeffBOM", "zero\u200bwidth", "soft\u00adhyphen", "nb\u00a0sp",
    "\u2028line\u2029para", "tab\tsep\t\tcol", "cr\rlf\r\nlf\n", "\r\n\r\n", "\n\n\n\n", " \n \n ", "\n   \n", "trailing   ",
    "   leading", "a\n\n\nb", "a \n b", "a\t\n\tb", "    four\n        eight\n\ttab", "\u3000全角\u3000", "\u2003em\u2003",
    "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "a<|endoftext|>b", " <|im_end|> ", "<|im_end|><|im_end|>", "<|im_end|",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", "<s>[INST] Hi [/INST] Yes</s>", "<s> <s>",
    "text</s>more", "<unk>", "<pad>", "<tool_call>{}</tool_call>", "x<tool_call>y", "<0x0A>", "<0x41><0x42>", "▁", "▁▁a", "a▁b", "Ġ", "Ċ",
    "lorikeet", " lorikeet", "lorikeets", " xylophones", "two xylophones sing", "Lorikeet LORIKEET", "supercalifragilisticexpialidocious",
    "\ufffd", "a\ufffdb", "\ufffd\ufffd\ufffd", "\U0010ffff", "\ue000", "\ufdd0", "\u0378", "\U000e0041",
]
LONG = ["a" * 1500, "ab" * 500, " " * 700 + "x", "\n" * 300, "0" * 400, "!" * 500, "中" * 300, "😀" * 150,
        "Donaudampfschifffahrtsgesellschaftskapitän" * 8, "x1" * 300, "\u0301" * 200, "aZ09+/" * 120]


def mixtures(rng, count):
    """Short runs of fragments with and without white space between them."""
    pools = [(WORDS, 10), (SPACES, 5), (NUMBERS, 4), (SIGNS, 5), (EMOJI, 1), (CONTROL, 1), (SPECIAL, 1)]
    choose = [pool for pool, weight in pools for _ in range(weight)]
    for _ in range(count):
        glue = rng.choice(["", " ", "", "  "])
        yield glue.join(rng.choice(rng.choice(choose)) for _ in range(rng.randint(1, 9)))


def spaces_before_digits(rng, count):
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 4)):
            parts += [rng.choice(["", "a", "x)", "Σ", "."]), rng.choice(SPACES) * rng.randint(1, 3), rng.choice(NUMBERS)]
        yield "".join(parts)


def code_points(rng, count):
    """Neighbours in one block of Unicode, assigned or not."""
    blocks = [0x80, 0x250, 0x300, 0x400, 0x590, 0x600, 0x900, 0xE00, 0x1000, 0x10A0, 0x1100, 0x1680, 0x1E00, 0x2000, 0x2070,
              0x2100, 0x2190, 0x2460, 0x2E80, 0x3040, 0x3300, 0x4E00, 0xA000, 0xAC00, 0xE000, 0xF900, 0xFB00, 0xFE00, 0xFF00,
              0x10000, 0x10400, 0x12000, 0x1D400, 0x1F300, 0x1F900, 0x20000, 0xE0000]
    for _ in range(count):
        block = rng.choice(blocks)
        yield "".join(chr(block + rng.randrange(128)) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 8)))


def replaced_bytes(rng, count):
    """Invalid UTF-8 as a client that replaces it would send it."""
    for _ in range(count):
        data = bytearray("a é 中 😀 1".encode() if rng.random() < 0.5 else b"")
        data += bytes(rng.randrange(256) for _ in range(rng.randint(1, 12)))
        yield bytes(rng.sample(list(data), len(data))).decode("utf-8", errors="replace")


def all_strings():
    rng = random.Random(20240711)
    strings = HAND + LONG
    strings += [a + s + b for s in SPACES for a, b in [("", ""), ("a", "b"), ("1", "1"), (".", " ")]]
    strings += list(mixtures(rng, 560)) + list(spaces_before_digits(rng, 120))
    strings += list(code_points(rng, 140)) + list(replaced_bytes(rng, 80))
    return list(dict.fromkeys(strings))
