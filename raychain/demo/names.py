"""Names for emoji in plain English: which may be drawn, in what order, and with which article."""

import hashlib
import re
from dataclasses import dataclass

from raychain.demo import picks

# What the Unicode names call oddly for someone who looks at the OpenMoji picture.
PLAINER = {
    "automobile": "red car",
    "black large square": "black square",
    "baguette bread": "baguette",
    "cheese wedge": "cheese",
    "cooking": "fried egg",
    "ewe": "sheep",
    "headphone": "headphones",
    "high voltage": "lightning bolt",
    "hourglass not done": "hourglass",
    "lady beetle": "ladybug",
    "large blue diamond": "blue diamond",
    "large orange diamond": "orange diamond",
    "locked": "padlock",
    "magnifying glass tilted left": "magnifying glass",
    "merperson": "mermaid",
    "ping pong": "ping pong paddle",
    "pool 8 ball": "8 ball",
    "soft ice cream": "ice cream cone",
    "tennis": "tennis ball",
    "thong sandal": "flip-flop",
    "unlocked": "open padlock",
    "vertical traffic light": "traffic light",
    "water pistol": "pistol",
    "white large square": "white square",
}
# Glyphs that do not show what they are called: two buttons whose letters the font lost, a tilted twin, an emptied
# hourglass beside a full one, dials that a tilt turns into another hour, and sizes of what is drawn in any size.
MISDRAWN = re.compile(
    r"P button|NEW button|magnifying glass tilted right|hourglass done|.*o'clock|\w+-thirty"
    r"|\w+ (small|medium|medium-small) square|small \w+ diamond"
)
MAX_WORDS = 4  # longer names push captions over the 18 tokens of the small text towers

SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL = range(0x1F1E6, 0x1F200)
TAG_END = "\U000e007f"
VARIATION_SELECTOR = "\ufe0f"

# Words that end in s and are one thing.
ONE_THING = {"canvas", "gas", "lens", "rhinoceros"}
# What takes no article: stuff, pairs and proper names.
UNCOUNTED = """
    bacon badminton biohazard bowling bread broccoli butter camping cheese coral cricket custard dna fire fog fondue
    food garlic ginger hockey ice infinity lacrosse lightning luggage mate meat oden om popcorn radioactive rain rice
    rugby sake salt skis snow soap spaghetti sushi water wireless wood yang yarn zzz
"""
PROPER = """
    aries, taurus, gemini, cancer, leo, virgo, libra, scorpio, sagittarius, capricorn, aquarius, pisces, ophiuchus,
    santa claus, mrs. claus, mx claus, mount fuji, tokyo tower
"""
WITH_THE = {"statue of liberty": "the ", "kaaba": "the ", "milky way": "the ", "star of david": "the "}
SOUNDS_LIKE_A = re.compile(r"uni|euro|ewe|one\b|one-|us|ut|uk\b", re.IGNORECASE)
SOUNDS_LIKE_AN = re.compile(r"[aeiou]|hour|x-|8|11|18|sos\b|ng\b", re.IGNORECASE)
BARE_HEADS = frozenset(UNCOUNTED.split())
BARE_NAMES = frozenset(name.strip() for name in PROPER.split(","))
BARE_STARTS = {"no", "people", "men", "women", "input"}
TAIL = re.compile(r" (with|without|of|in|on|behind|over|at|and|\w+ing) .*")


@dataclass(frozen=True, slots=True)
class Name:
    """One class of the demo: its English name, the emoji's code points, and whether it may be mirrored and tilted."""

    text: str
    emoji: str
    pick: bool


def plain(emoji: str, listed: str) -> str:
    """English for one of the `emoji` package's names: ":red_apple:" → "red apple", a country's → "flag of Japan"."""
    text = listed.strip(":").replace("_", " ").replace("’", "'").replace("“", "").replace("”", "")
    if ord(emoji[0]) in REGIONAL or emoji.endswith(TAG_END):
        text = f"flag of {text}"
    return PLAINER.get(text, text)


def candidates(*, sequences: bool) -> list[Name]:
    """Every emoji with a usable name: the picks, then other single ones, then sequences if the font can shape them.

    Skin tones, mis-drawn glyphs and names of more than four words are left out. Behind the picks the order is a fixed
    shuffle, so a longer list begins with every shorter one, whatever the seed. Needs the `emoji` package.
    """
    from emoji import EMOJI_DATA, STATUS

    found: dict[str, str] = {}
    for emoji, entry in EMOJI_DATA.items():
        if entry["status"] != STATUS["fully_qualified"] or any(ord(point) in SKIN_TONES for point in emoji):
            continue
        text = plain(emoji, entry["en"])
        if len(text.split()) <= MAX_WORDS and not MISDRAWN.fullmatch(text):
            found.setdefault(text, emoji)
    chosen = [Name(text, found.pop(text), pick=True) for text in picks.in_order() if text in found]
    rest = [Name(text, found[text], pick=False) for text in sorted(found, key=_shuffled)]
    single = [name for name in rest if is_single(name.emoji)]
    joined = [name for name in rest if not is_single(name.emoji)] if sequences else []
    return chosen + single + joined


def is_single(emoji: str) -> bool:
    """Whether the emoji is one code point (a variation selector aside), which every font engine can draw."""
    return len(emoji.replace(VARIATION_SELECTOR, "")) == 1


def with_article(name: str) -> str:
    """The name as a noun phrase: "a cat", "an apple", "grapes", "Santa Claus", "the Statue of Liberty"."""
    lower = name.lower()
    if lower in WITH_THE:
        return WITH_THE[lower] + name
    if lower in BARE_NAMES or _is_plural_or_stuff(lower):
        return name
    vowel = SOUNDS_LIKE_AN.match(name) and not SOUNDS_LIKE_A.match(name)
    return f"an {name}" if vowel else f"a {name}"


def _is_plural_or_stuff(lower: str) -> bool:
    head = TAIL.sub("", lower).split()[-1]
    if head in BARE_HEADS or lower.split()[0] in BARE_STARTS:
        return True
    return head.endswith("s") and head not in ONE_THING and not head.endswith(("ss", "us", "is"))


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
