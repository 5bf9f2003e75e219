"""Random texts that are hard on a tokenizer: 22 languages, code, runs of whitespace, look-alikes of control tokens,
numbers, emoji, broken bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator

from xgen.tokens.xgen import CONTROL

# One sentence in each of the 22 languages of XGen's Wikipedia data.
LANGUAGES = {
    "bg": "Вечерта децата четат три книги край реката, а баба пече хляб.",
    "ca": "Al vespre els nens llegeixen tres llibres vora el riu; l'àvia fa pa.",
    "cs": "Večer děti čtou u řeky tři knihy a babička peče žitný chléb.",
    "da": "Om aftenen læser børnene tre bøger ved åen, og bedstemor bager brød.",
    "de": "Abends lesen die Kinder am Fluss drei Bücher; Großmutter bäckt süßes Brot.",
    "en": "In the evening the children don't sleep; they've 3 books, it's 1984, I'm sure you'll read.",
    "es": "¿Por qué los niños leen 3 libros junto al río? La abuela hornea pan.",
    "fr": "L’été, les élèves lisent trois œuvres près du fleuve, où ça sent le pain.",
    "hr": "Navečer djeca čitaju tri knjige uz rijeku, a baka peče kruh šećerom.",
    "hu": "Este a gyerekek három könyvet olvasnak a folyónál, nagyanyó őszi kenyeret süt.",
    "it": "La sera i bambini leggono tre libri: perché la nonna fa così il pane?",
    "ja": "夕方、子どもたちは川のそばで本を三冊読み、祖母はパンを焼く。カタカナ１２３！",
    "nl": "'s Avonds lezen de kinderen drie boeken bij de rivier; oma bakt brood.",
    "pl": "Wieczorem dzieci czytają trzy książki nad rzeką, a babcia piecze żytni chleb.",
    "pt": "À noite as crianças leem três livros junto ao rio; a avó faz pão.",
    "ro": "Seara copiii citesc trei cărți lângă râu, iar bunica face pâine și țuică.",
    "ru": "Вечером дети читают у реки три книги, а бабушка печёт хлеб.",
    "sl": "Zvečer otroci berejo tri knjige ob reki, babica pa peče žemlje.",
    "sr": "Увече деца читају три књиге крај реке, а бака меси хлеб и ђевреке.",
    "sv": "På kvällen läser barnen tre böcker vid ån, och mormor bakar bröd.",
    "uk": "Увечері діти читають біля річки три книжки, а бабуся пече хліб і їжу.",
    "zh": "傍晚孩子们在河边读三本书，奶奶烤面包。１９８４年！繁體字也有。",
}
CODE = (
    "def f(x: int = 0) -> int:\n    if x < 10:\n        return x ** 2\n\treturn None\n",
    "for (int i = 0; i < n; ++i) {\n\t\t\ta[i] += b[i];\n\t\t}\n",
    "SELECT * FROM `t` WHERE a != 'it''s' AND b >= 3.14e-10;\r\n",
    '    {"key": [1, 2, 3], "nested": {"a": null}},\n        # TODO: fix\n',
    '<div class="x">&nbsp;</div>\n\n\n   <!-- \'ll -->',
    "const f = (x) => `${x}\\n`;   // $$$ === !== ??\n",
)
WHITESPACE = (
    " ",
    "\t",
    "\n",
    "\r",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
    "\u3000",
    "\u200b",
    "\ufeff",
)
LOOK_ALIKES = (
    *("<|endoftext|>", *CONTROL, "<|endoftext|", "|endoftext|>", "<fim_", "<|im_start|>", "</s>", "<0x0A>"),
    *("<s>", "<unk>", "▁", "▁▁▁", "[INST]", "[/INST]", "[REF]", "[PAD9]", "<|begin_of_text|>", "<|eot_id|>", "<0xE2>"),
)
FLAG = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
EMOJI = ("😀", "👍🏽", "👩\u200d👩\u200d👧\u200d👦", "🇩🇪🇫🇷", FLAG, "❤️", "1️⃣", "☺", "🫠")
CONTRACTIONS = ("I'm", "WE'LL", "it'S", "'Ve", "'re", "d'D", "x''s", "' t", "l’été's", "'tis", "'")


def random_texts(count: int, seed: int) -> Iterator[str]:
    """`count` texts of one to eight fragments."""
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(_fragment(draw) for _ in range(draw.randint(1, 8)))


def _fragment(draw: random.Random) -> str:
    choice = draw.randrange(10)
    if choice == 0:
        return _slice(draw, draw.choice(list(LANGUAGES.values())))
    if choice == 1:
        return _slice(draw, draw.choice(CODE))
    if choice == 2:
        length: int = draw.choice((*range(1, 13), 30, 31, 32, 33, 40, 62, 63, 95))
        return draw.choice(" \t\n ") * length
    if choice == 3:
        return "".join(draw.choices(WHITESPACE, weights=[9, 9, 4, *[1] * (len(WHITESPACE) - 3)], k=draw.randint(1, 12)))
    if choice == 4:
        return draw.choice(LOOK_ALIKES)
    if choice == 5:
        return draw.choice(EMOJI) * draw.randint(1, 3)
    if choice == 6:
        return draw.choice(CONTRACTIONS)
    if choice == 7:
        return "".join(
            draw.choices("0123456789.,٣५½²Ⅷ", weights=[9] * 10 + [3, 3, 1, 1, 1, 1, 1], k=draw.randint(1, 12))
        )
    if choice == 8:
        return draw.randbytes(draw.randint(1, 24)).decode("utf-8", errors="replace")
    return "".join(_character(draw) for _ in range(draw.randint(1, 6)))


def _slice(draw: random.Random, text: str) -> str:
    start = draw.randrange(len(text))
    return text[start : start + draw.randint(1, len(text))]


def _character(draw: random.Random) -> str:
    code = draw.choice(
        (draw.randrange(0x80), draw.randrange(0x3000), draw.randrange(0x10000), draw.randrange(0x110000))
    )
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)
