"""English as it is written to English as it is read: numbers, money, dates, times, units, abbreviations, addresses."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
SHORT_MONTHS = {**{month[:3]: month for month in MONTHS}, "Sept": "September"}
SHORT_DAYS = {
    **{"Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday"},
    **{"Thur": "Thursday", "Thurs": "Thursday", "Fri": "Friday", "Sat": "Saturday", "Sun": "Sunday"},
}

# Months and days that are words of their own, too.
NAMES = frozenset(["May", "Mar", "Sun", "Sat"])

# Before a name, whose full stop never ends a sentence.
TITLES = {
    **{"Dr": "Doctor", "Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Prof": "Professor", "Gen": "General"},
    **{"Sen": "Senator", "Rep": "Representative", "Gov": "Governor", "Capt": "Captain", "Lt": "Lieutenant"},
    **{"Sgt": "Sergeant", "Col": "Colonel", "Rev": "Reverend", "Hon": "Honorable", "Pres": "President", "Mt": "Mount"},
    **{"Cpl": "Corporal", "Maj": "Major", "Cmdr": "Commander", "Ft": "Fort", "Fr": "Father", "Supt": "Superintendent"},
}
# After a name.
STREETS = {
    **{"St": "Street", "Dr": "Drive", "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road", "Ln": "Lane", "Ct": "Court"},
    **{"Hwy": "Highway", "Pkwy": "Parkway", "Sq": "Square", "Apt": "Apartment"},
}
ABBREVIATIONS = {
    **{"e.g": "for example", "i.e": "that is", "etc": "et cetera", "vs": "versus", "approx": "approximately"},
    **{
        "Jr": "Junior",
        "Sr": "Senior",
        "Inc": "Incorporated",
        "Ltd": "Limited",
        "Corp": "Corporation",
        "Co": "Company",
    },
    **{"dept": "department", "Dept": "Department", "est": "established", "Assn": "Association", "Bros": "Brothers"},
    **{"a.m": "A M", "p.m": "P M", "A.M": "A M", "P.M": "P M", "cf": "compare", "viz": "namely", "al": "al"},
    **{"Ph.D": "P H D", "B.C": "B C", "A.D": "A D", "b.c": "B C", "a.k.a": "also known as", "govt": "government"},
    **{"misc": "miscellaneous", "tel": "telephone", "Tel": "Telephone", "ext": "extension", "Ext": "Extension"},
    **{"Fig": "Figure", "fig": "figure", "Vol": "Volume", "vol": "volume", "Ch": "Chapter", "ch": "chapter"},
    **{"pp": "pages", "ed": "edition", "Eq": "Equation", "eq": "equation", "Sec": "Section", "max": "maximum"},
    **{"min": "minimum", "avg": "average", "w/o": "without", "w/": "with", "b/c": "because", "Univ": "University"},
    **STREETS,
    **TITLES,
}
# These are words, or an end of a sentence, too; only before a number are they short for something.
NUMBERED = {"No": "number", "no": "number", "Nos": "numbers", "p": "page", "art": "article", "Art": "Article"}
# Written without a full stop as well.
BARE = frozenset(
    ["Dr", "Mr", "Mrs", "Ms", "Prof", "vs", "etc", "Jr", "Sr", "Blvd", "Ave", "Hwy", "Pkwy", "w/o", "w/", "b/c"]
)

# One and several of what a number is of.
UNITS = {
    **{"km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "nm": "nanometer", "mi": "mile"},
    **{"ft": "foot", "in": "inch", "yd": "yard", "kg": "kilogram", "g": "gram", "mg": "milligram", "lb": "pound"},
    **{"lbs": "pound", "oz": "ounce", "t": "ton", "L": "liter", "l": "liter", "ml": "milliliter", "mL": "milliliter"},
    **{
        "gal": "gallon",
        "pt": "pint",
        "qt": "quart",
        "s": "second",
        "sec": "second",
        "secs": "second",
        "ms": "millisecond",
    },
    **{"min": "minute", "mins": "minute", "h": "hour", "hr": "hour", "hrs": "hour", "yr": "year", "yrs": "year"},
    **{"Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz", "W": "watt", "kW": "kilowatt"},
    **{"MW": "megawatt", "kWh": "kilowatt hour", "V": "volt", "A": "amp", "mA": "milliamp", "mAh": "milliamp hour"},
    **{"B": "byte", "kB": "kilobyte", "KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte"},
    **{"kbps": "kilobit per second", "Mbps": "megabit per second", "Gbps": "gigabit per second", "px": "pixel"},
    **{"mph": "mile per hour", "kph": "kilometer per hour", "km/h": "kilometer per hour", "m/s": "meter per second"},
    **{"mpg": "mile per gallon", "rpm": "revolution per minute", "bpm": "beat per minute", "fps": "frame per second"},
    **{"dB": "decibel", "cal": "calorie", "kcal": "kilocalorie", "J": "joule", "kJ": "kilojoule", "Pa": "pascal"},
    **{
        "psi": "pound per square inch",
        "ha": "hectare",
        "tbsp": "tablespoon",
        "tsp": "teaspoon",
        "dpi": "dot per inch",
    },
    **{"°C": "degree Celsius", "°F": "degree Fahrenheit", "°": "degree", "%": "percent", "K": "kelvin"},
    **{
        "sq ft": "square foot",
        "m²": "square meter",
        "km²": "square kilometer",
        "m³": "cubic meter",
        "cm³": "cubic centimeter",
    },
}
INVARIABLE = frozenset(["percent", "hertz", "kilohertz", "megahertz", "gigahertz"])
# Units that are letters of the alphabet or words: only where a space or a digit shows what they are.
CLOSE_UNITS = frozenset(["%", "°", "°C", "°F"])
SPACED_UNITS = frozenset(UNITS) - {"A", "B", "K", "W", "V", "J", "t", "s", "g", "l", "in", "pt", "cal", "min", "sec", "px"} | {
    "min", "sec", "g", "px", "cal", "V", "W"
}  # fmt: skip

SCALES = {
    "k": "thousand",
    "K": "thousand",
    "M": "million",
    "m": "million",
    "B": "billion",
    "bn": "billion",
    "T": "trillion",
}
SCALE_WORDS = frozenset(["hundred", "thousand", "million", "billion", "trillion", "dozen"])
CURRENCIES = {
    **{"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny"), "¥": ("yen", None)},
    **{"₹": ("rupee", None), "₩": ("won", None), "US$": ("U S dollar", "cent"), "C$": ("Canadian dollar", "cent")},
    **{"A$": ("Australian dollar", "cent")},
}
CODES = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹"}
FRACTIONS = {
    **{"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5)},
    **{"⅘": (4, 5), "⅙": (1, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8)},
}

# Acronyms that are read as words, and ones that look like words and are read by letters.
WORD_ACRONYMS = frozenset(
    ["NASA", "NATO", "UNESCO", "UNICEF", "OPEC", "FIFA", "UEFA", "AIDS", "LASER", "RADAR", "SONAR", "SCUBA", "ASCII", "COVID", "SARS", "NASDAQ", "FEMA", "OSHA", "NAFTA", "ASEAN", "PIN", "SIM", "RAM", "ROM", "JPEG", "GIF", "SQL", "LAN", "WAN", "DOS", "MIDI", "CAPTCHA", "YOLO", "SWAT", "POTUS", "SCOTUS", "NAACP", "WASP", "ZIP", "VIN", "NICU", "SAT", "MERS", "ESOL", "LED", "BERT", "CUDA", "RAID", "WIFI", "LIDAR", "TED", "IKEA", "LEGO", "CERN", "ESPN", "OK"]
) - {"SQL", "NAACP", "ESPN", "LED", "VIN", "SAT"}  # fmt: skip
LETTER_ACRONYMS = frozenset(
    ["ASAP", "UCLA", "AARP", "ACLU", "IEEE", "ISBN", "IOU", "FAQ", "AWOL", "USAF", "UAE", "UEA", "EULA", "AAA", "AOL", "IUCN", "UI", "API", "OECD", "UIUC", "EPA", "ECG", "EEG", "ETA", "RSVP", "IOS"]
) - {"AWOL"}  # fmt: skip
SAID = {
    **{
        "OK": "okay",
        "JPEG": "jay peg",
        "NAACP": "N double A C P",
        "IEEE": "I triple E",
        "SQL": "S Q L",
        "WIFI": "wi-fi",
    },
    **{"AAA": "triple A", "PhD": "P H D", "PhDs": "P H D's", "iOS": "I O S", "SaaS": "sass", "DVDs": "D V D's"},
}

ROMAN_VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
# What a Roman numeral after it counts; after any other name it tells one of several of that name.
COUNTED = frozenset(
    [
        "Chapter",
        "Part",
        "Act",
        "Scene",
        "Volume",
        "Book",
        "War",
        "Section",
        "Article",
        "Phase",
        "Type",
        "Stage",
        "Level",
        "Appendix",
        "Figure",
        "Table",
        "Title",
        "Class",
        "Grade",
        "Rocky",
        "Episode",
        "Season",
        "Bowl",
        "Final",
        "Fantasy",
        "Mark",
        "Model",
        "Unit",
        "Lesson",
        "Step",
        "Group",
        "Category",
        "Apollo",
        "Gemini",
        "Division",
        "Tier",
        "Scene",
    ]
)
RULERS = frozenset(
    ["King", "Queen", "Pope", "Emperor", "Empress", "Tsar", "Czar", "Prince", "Sultan", "Kaiser", "Saint", "Elder"]
)

YEAR_CUES = frozenset(
    [
        "in",
        "since",
        "by",
        "from",
        "until",
        "till",
        "of",
        "year",
        "during",
        "before",
        "after",
        "around",
        "circa",
        "early",
        "late",
        "mid",
        "to",
        "and",
        "spring",
        "summer",
        "fall",
        "autumn",
        "winter",
        "through",
        "between",
        "back",
        "class",
        "copyright",
    ]
)
# Before a number of a service, and before a number with a point that is of a version.
CALLS, SERVICES = (
    frozenset(["call", "dial", "called", "calling", "phone", "text"]),
    frozenset(["911", "411", "311", "999", "112"]),
)
RELEASED = frozenset(
    [
        "Python",
        "Version",
        "version",
        "Release",
        "release",
        "Android",
        "Windows",
        "Ubuntu",
        "Java",
        "Node",
        "PHP",
        "Ruby",
        "CUDA",
        "iOS",
        "macOS",
        "Linux",
    ]
)
# Before a thing that has a size: a five dollar bill, a ten mile walk.
ARTICLES = frozenset(["a", "an", "another"])
NO_THINGS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "for",
        "from",
        "to",
        "and",
        "or",
        "but",
        "per",
        "each",
        "every",
        "long",
        "tall",
        "high",
        "wide",
        "deep",
        "away",
        "is",
        "was",
        "are",
    ]
)

SYMBOLS = {
    "&": "and",
    "@": "at",
    "+": "plus",
    "=": "equals",
    "%": "percent",
    "×": "times",
    "÷": "divided by",
    "§": "section",
}
SYMBOLS |= {
    "±": "plus or minus",
    "<": "less than",
    ">": "greater than",
    "~": "about",
    "°": "degrees",
    "^": "to the power of",
}
ADDRESS_SIGNS = {
    **{".": "dot", "/": "slash", "-": "dash", "_": "underscore", "@": "at", ":": "colon", "?": "question mark"},
    **{"=": "equals", "&": "and", "#": "hash", "%": "percent", "+": "plus", "~": "tilde"},
}
TOP_DOMAINS = "com|org|net|edu|gov|mil|int|io|ai|co|dev|app|info|biz|me|tv|us|uk|ca|de|fr|eu|jp|au|in|ch|it|nl|xyz"
DOMAIN_WORDS = frozenset(["com", "org", "net", "edu", "gov", "mil", "info", "biz", "dev", "app"])
LETTER_FOLDS = str.maketrans(
    {
        "ß": "ss",
        "ẞ": "SS",
        "æ": "ae",
        "Æ": "Ae",
        "œ": "oe",
        "Œ": "Oe",
        "ø": "o",
        "Ø": "O",
        "ł": "l",
        "Ł": "L",
        "đ": "d",
        "ð": "d",
    }
    | {"Đ": "D", "Ð": "D", "þ": "th", "Þ": "Th", "ı": "i"}
)

# Words that are looked at together, at most.
MAX_WORDS = 24

_PLAIN = re.compile(r"[\"'(\[]*[^\W\d_]+(?:['’-][^\W\d_]+)*[\"')\]]*[,;:!?.]*[\"')\]]*")
_CORE = re.compile(r"^[\"'(\[]*(.*?)[\"')\],;:!?.]*$", re.DOTALL)
_NUMBER = r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_MONTH = "|".join([*MONTHS, *SHORT_MONTHS])
_CURRENCY = "|".join(re.escape(sign) for sign in sorted(CURRENCIES, key=len, reverse=True))
_UNIT = "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
_SCALE = "|".join(sorted(SCALE_WORDS))


def is_available() -> bool:
    r"""
    Tells whether English can be normalized.

    Returns:
        `bool`: whether the package that it takes is installed.
    """
    return find_spec("inflect") is not None


class EnglishNormalizer:
    r"""
    Writes out what an English text holds of numbers and short forms, the way an American reads it. Words come one at a
    time; a number, an address or an abbreviation waits for what follows it, so that a complete text and one that is still
    being written read the same.

    Raises:
        `ValueError`: if the package `inflect` is not installed.

    Example:

    ```python
    >>> from transformers_sled.normalization_sled import EnglishNormalizer

    >>> normalizer = EnglishNormalizer()
    >>> normalizer.push(["It", " costs", " $3.50"]), normalizer.push([" in", " all."])
    (['It', ' costs'], [' three', ' dollars', ' and', ' fifty', ' cents', ' in', ' all.'])

    ```
    """

    def __init__(self) -> None:
        if not is_available():
            raise ValueError(
                "`normalizer` 'en' needs the package inflect: pip install 'transformers-sled[text]', or pip install inflect."
            )
        self._engine: Any = import_module("inflect").engine()
        self._words: list[str] = []
        # The two words before them, as they were written.
        self._left: list[str] = []

    def push(self, words: list[str]) -> list[str]:
        r"""
        Takes the next words.

        Args:
            words (`list[str]`):
                The words, each with the white space before it.

        Returns:
            `list[str]`: the words to read that are final now.
        """
        read: list[str] = []
        for word in words:
            read += self._push_word(word)
        return read

    def finish(self) -> list[str]:
        r"""
        Ends the text.

        Returns:
            `list[str]`: the remaining words to read.
        """
        return self._read(None)

    def _push_word(self, word: str) -> list[str]:
        text = word.lstrip()
        read = self._read(None) if word.startswith("\n") else []
        if self._is_plain(text):
            if self._words:
                if self._goes_on(text):
                    self._words.append(word)
                    return read
                read += self._read(text)
            self._remember(text)
            return [*read, _fold(word)]
        self._words.append(word)
        if len(self._words) >= MAX_WORDS:
            read += self._read(None)
        return read

    def _remember(self, *words: str) -> None:
        self._left = [*self._left, *words][-2:]

    def _is_plain(self, word: str) -> bool:
        """Whether a word is read as it is written, whatever stands beside it."""
        if _PLAIN.fullmatch(word) is None or any(character.isnumeric() for character in word):
            return False
        core = _get_core(word)
        if (
            core in BARE
            or core in SAID
            or (len(core) > 1 and sum(map(str.isupper, core)) > 1 and core[1:] != core[1:].lower())
        ):
            return core not in BARE and core not in SAID and not _has_capitals(core)
        if core in SHORT_MONTHS and core not in NAMES:
            return False
        if core == "I":
            return not _is_first_of_name(self._left)
        if len(core) == 1 and core.isupper() and word.endswith("."):
            return False
        return (
            not (core in ABBREVIATIONS or core in NUMBERED or core in SHORT_MONTHS or core in SHORT_DAYS)
            or not (word.rstrip("\"')]").endswith(".") or word.endswith(".,"))
            or (core in ("May", "Sun", "Sat", "Mar", "min", "max", "al", "ed") and core in MONTHS)
        )

    def _goes_on(self, word: str) -> bool:
        """Whether a plain word belongs to the number before it."""
        before, core = self._words[-1].lstrip(), _get_core(word)
        if before[-1] in ",;:!?" and core not in SHORT_MONTHS:
            return False
        if not re.search(r"\d", before):
            return False
        return (
            core in SCALE_WORDS
            or core in MONTHS
            or core in SHORT_MONTHS
            or core in SPACED_UNITS
            or core in ("am", "pm", "x", "sq")
        )

    def _read(self, right: str | None) -> list[str]:
        """Words to read of what waits, with the word that follows it."""
        if not self._words:
            return []
        words, self._words = self._words, []
        space = words[0][: len(words[0]) - len(words[0].lstrip())]
        text = _Reading(self._engine, "".join(words).lstrip(), self._left, right).read().strip()
        if not self._left or self._left[-1].rstrip("\"')]")[-1:] in (".", "!", "?"):
            text = text[:1].upper() + text[1:]
        self._remember(*(word.lstrip() for word in words))
        read = _fold(re.sub(r"\s+", " ", text).strip()).split(" ")
        return [(space if index == 0 else " ") + word for index, word in enumerate(read) if word]


class _Reading:
    """Reads a few words that hold numbers or short forms, knowing their neighbours."""

    def __init__(self, engine: Any, text: str, left: list[str], right: str | None) -> None:
        self._engine = engine
        self._text = text
        self._left = left
        self._right = right

    def read(self) -> str:
        rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
            (r"(?<![\w@])(?:https?://|www\.)[^\s<>\"]+[^\s<>\".,;:!?')\]]", self._read_address),
            (r"(?<![\w@])[\w.+-]+@[\w-]+(?:\.[\w-]+)+", self._read_address),
            (rf"(?<![\w@.])(?:[A-Za-z][\w-]*\.)+(?:{TOP_DOMAINS})(?:/[^\s<>\"]*[^\s<>\".,;:!?')\]])?(?![\w@]|\.\w)", self._read_address),
            (r"(?<!\S)/?(?:[\w.-]+/){2,}[\w.-]*\w(?!\S)", self._read_path),
            (r"(?<![\w.,-])(?:\+?1[ .-])?\(?\d{3}\)?[ .-]\d{3}[.-]\d{4}(?![\w-])", self._read_phone),
            (r"(?<![\w.,-])\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}(?![\w-])", self._read_phone),
            (r"(?<![\w.,/-])\d{3}-\d{4}(?![\w-])", self._read_phone),
            (r"(?<![\w.])[vV]?\d+(?:\.\d+){2,}(?![\w.]*\d)|(?<![\w.])[vV]\.? ?\d+(?:\.\d+)*(?!\w)", self._read_version),
            (r"(?<![\w/-])(\d{4})-(\d{2})-(\d{2})(?![\w/-])", lambda m: self._read_date(m, m[1], m[2], m[3])),
            (r"(?<![\w/])(\d{1,2})/(\d{1,2})/(\d{4}|\d{2})(?![\w/])", lambda m: self._read_date(m, m[3], m[1], m[2])),
            (rf"(?<!\w)({_MONTH})\.? (\d{{1,2}})(?:st|nd|rd|th)?-(\d{{1,2}})(?:st|nd|rd|th)?(?![\w.]*\d)", lambda m: f"{_get_month(m[1])} {self._ordinal(m[2])} to {self._ordinal(m[3])}"),
            (rf"(?<!\w)({_MONTH})\.? (\d{{1,2}})(?:st|nd|rd|th)?(?:,? (\d{{4}}))?(?![\w:/%]|[.,]\d)", self._read_month_first),
            (rf"(?<![\w.,])(\d{{1,2}})(?:st|nd|rd|th)? ({_MONTH})\.?(?:,? (\d{{4}}))?(?!\w)", self._read_day_first),
            (rf"(?<!\w)({_MONTH})\.? (\d{{4}})(?!\w)", lambda m: f"{_get_month(m[1])} {self._year(int(m[2]))}"),
            (r"^(\d{1,2})(?:st|nd|rd|th)?(?:, (\d{4}))?(?=[,.;:!?)\"']*$)", self._read_day_after_month),
            (r"^(\d{1,2})-(\d{1,2})(?=[,.;:!?)\"']*$)", self._read_days_after_month),
            (r"(?<![\w:.,-])(\d{1,2})(?::(\d{2}))? ?(?:-|to) ?(\d{1,2})(?::(\d{2}))? ?([ap])\.?m(?:\.|\b)", self._read_time_range),
            (r"(?<![\w:.,])(\d{1,2}):(\d{2})(?::(\d{2}))?(?: ?([apAP])\.?[mM](?:\.|\b))?(?![\w:])", self._read_time),
            (r"(?<![\w:.,])(\d+):(\d+)(?![\w:])", lambda m: f"{self._number(m[1])} to {self._number(m[2])}"),
            (r"(?<![\w:.,])(\d{1,2}) ?([apAP])\.?[mM](?:\.|\b)(?!\w)", lambda m: f"{self._number(m[1])} {m[2].upper()} M" + self._get_stop(m)),
            (rf"({_CURRENCY})({_NUMBER})(?:[kKMBT]|bn)?(?: ?(?:-|to) ?)(?:{_CURRENCY})?({_NUMBER})(?: ?({_SCALE})\b|([kKMBT]|bn)\b)?(?![\w.]*\d)", self._read_money_range),
            (rf"([-−]?)({_CURRENCY})({_NUMBER})(?:[ -]?({_SCALE})\b|([kKMBTm]|bn)\b)?", self._read_money),
            (rf"(?<![\w.])(USD|EUR|GBP|JPY|INR) ?({_NUMBER})(?: ({_SCALE})\b)?", lambda m: self._money(CODES[m[1]], m[2], m[3])),
            (rf"(?<![\w.])({_NUMBER})(?: ({_SCALE}))? ?(USD|EUR|GBP|JPY|INR)\b", lambda m: self._money(CODES[m[3]], m[1], m[2])),
            (rf"(?<![\w.])({_NUMBER}) ?¢", lambda m: self._count(m[1], "cent")),
            (rf"(?<![\w.])({_NUMBER}) ?€", lambda m: self._money("€", m[1], None)),
            (rf"(?<![\w.])({_NUMBER})x(?!\w)", lambda m: f"{self._number(m[1])} times"),
            (r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", self._read_phone),
            (r"(?<![\w.'])(\d)'(?: ?(\d{1,2})(?:\"|''))(?!\w)", lambda m: f"{self._count(m[1], 'foot')} {self._number(m[2])}"),
            (rf"(?<![\w.])({_NUMBER}) ?[x×] ?({_NUMBER})(?: ?[x×] ?({_NUMBER}))?(?!\w)", self._read_size),
            (r"(?<![\w.,'])'?(\d{2,4})s(?![\w'])", self._read_decade),
            (r"(?<![\w.,])(\d+(?:,\d{3})*)(st|nd|rd|th)(?!\w)", lambda m: self._ordinal(m[1])),
            (r"(?<![\w.,/])(?:(\d+)[ -]?)?([½⅓⅔¼¾⅕⅖⅗⅘⅙⅛⅜⅝⅞])", lambda m: self._mixed(m[1], *FRACTIONS[m[2]])),
            (r"(?<![\w.,/])(\d+)[ -](\d{1,2})/(\d{1,3})(?![\w/])", lambda m: self._mixed(m[1], int(m[2]), int(m[3]))),
            (r"(?<![\w.,/])24/7(?![\w/])", lambda m: "twenty-four seven"),
            (r"(?<![\w.,/])(\d{1,2})/(\d{1,3})(?![\w/])", self._read_fraction),
            (rf"(?<![\w.,'])(-?)({_NUMBER})(?:-({_NUMBER}))?( ?)({_UNIT})(\.?)(?![\w/²³])", self._read_unit),
            (r"(?<![\w.,-])(\d{4})-(\d{2,4})(?![\w-])", self._read_year_range),
            (rf"(?<![\w.,-])({_NUMBER})-({_NUMBER})(?![\w.]*\w|-)", lambda m: f"{self._number(m[1])} to {self._number(m[2])}"),
            (r"(?<!\w)(?:No|no|Nos)\. ?(?=\d)|(?<![\w&])#(?=\d)", lambda m: "number "),
            (r"(?<!\w)(p|pp|art|Art)\. ?(?=\d)", lambda m: {"pp": "pages "}.get(m[1]) or NUMBERED.get(m[1], m[1]) + " "),
            (rf"(?<![\w.])({_NUMBER})([kM]|bn)(?!\w)", lambda m: f"{self._number(m[1])} {SCALES[m[2]]}"),
            (r"(?<!\w)[A-Za-z]*[A-Z][A-Za-z]*(?:-?\d+[A-Za-z]*)+(?!\w)|(?<![\w.,])\d+[A-Z]+(?:\d*[A-Z]*)*(?!\w)", self._read_code),
            (r"(?<![\w.])(?:[A-Za-z]\.){2,}(?:[A-Za-z](?!\w))?", self._read_initials),
            (r"(?<![\w.])([A-Za-z][A-Za-z./]*?)(\.(?=[\s,;:!?)\"']|$)|(?=\s|$))", self._read_abbreviation),
            (rf"(?<![\w.,'])([-−]?)({_NUMBER})(?![\w])", self._read_number),
            (r"^I(?='s(?!\w)|[,.;:!?)\"']*$)", self._read_first),
            (r"(?<![\w.])[A-Z][A-Za-z]*[A-Z]+(?:'?s)?(?!\w)|(?<!\w)(?:iOS|PhDs?|SaaS|SQL|OK)(?!\w)", self._read_capitals),
            (r"(?<=[a-z])/(?=(?:month|year|day|hour|week|night|person|minute|second|mo|hr)\b)", lambda m: " per "),
            (r"\band/or\b", lambda m: "and or"),
            (r"(?<=[A-Za-z])/(?=[A-Za-z])", lambda m: " or " if self._is_choice(m) else " slash "),
            (r"(?<=\w)\+\+|(?<=[A-Za-z])\+(?!\w)", lambda m: " plus" * len(m[0])),
            (r"(?<=[A-Za-z])#(?!\w)", lambda m: " sharp"),
            (r"#(?=[A-Za-z])", lambda m: "hashtag "),
            (r"@(?=[A-Za-z])", lambda m: "at "),
            (r"(?<=\s)-(?=\s)", lambda m: "minus"),
            (r"<=|>=|[&@+=%×÷§±<>~°^]", self._read_symbol),
            (_NUMBER, lambda m: f" {self._number(m[0])} "),
        ]  # fmt: skip
        for pattern, rule in rules:
            self._text = re.sub(pattern, rule, self._text)
        return self._text

    # Neighbours

    def _get_before(self, match: re.Match[str]) -> str:
        """The word before a match, without its marks."""
        words = match.string[: match.start()].split()
        word = words[-1] if words else self._left[-1] if self._left else ""
        return _get_core(word)

    def _get_after(self, match: re.Match[str]) -> str:
        """The word after a match, with its marks; empty at the end of the text."""
        rest = match.string[match.end() :]
        if rest[:1] in (",", ";", ":", "!", "?", ")"):
            return ""
        words = rest.lstrip(".\"'").split()
        return words[0] if words else self._right or ""

    def _get_stop(self, match: re.Match[str]) -> str:
        """The full stop of an abbreviation, where it ends the sentence as well."""
        if not match[0].endswith("."):
            return ""
        rest = match.string[match.end() :].lstrip()
        if rest[:1] and not rest[0].isalnum():
            return ""
        after = self._get_after(match)
        return "." if not after or after[0].isupper() else ""

    # Numbers

    def _cardinal(self, number: int) -> str:
        return self._engine.number_to_words(number, andword="").replace(",", "")

    def _number(self, text: str) -> str:
        text = text.replace(",", "")
        whole, point, decimals = text.partition(".")
        if len(whole) > 15 or (len(whole) > 1 and whole[0] == "0"):
            words = self._digits(whole)
        else:
            words = self._cardinal(int(whole)) if whole else ""
        return f"{words} point {self._digits(decimals)}".strip() if point else words

    def _digits(self, digits: str) -> str:
        return " ".join(self._cardinal(int(digit)) for digit in digits)

    def _ordinal(self, text: str) -> str:
        return self._engine.ordinal(self._number(text))

    def _year(self, year: int) -> str:
        high, low = divmod(year, 100)
        if year < 1000 or year > 2999 or 2000 <= year <= 2009 or (high % 10 == 0 and low < 10):
            return self._cardinal(year)
        if low == 0:
            return f"{self._cardinal(high)} hundred"
        return f"{self._cardinal(high)} {'oh ' if low < 10 else ''}{self._cardinal(low)}"

    def _plural(self, noun: str) -> str:
        """Several of a thing; of `mile per hour` the first word."""
        first, per, rest = noun.partition(" per ")
        if first in INVARIABLE:
            return noun
        head, space, last = first.rpartition(" ")
        if head == "degree":
            return f"degrees {last}"
        plurals = {"foot": "feet", "inch": "inches", "penny": "pence", "yen": "yen", "won": "won"}
        return f"{head}{space}{plurals.get(last, last + 's')}{per}{rest}"

    def _count(self, number: str, noun: str) -> str:
        return f"{self._number(number)} {noun if number == '1' else self._plural(noun)}"

    def _mixed(self, whole: str | None, numerator: int, denominator: int) -> str:
        if denominator == 2:
            part = "half" if numerator == 1 else "halves"
        elif denominator == 4:
            part = "quarter" if numerator == 1 else "quarters"
        else:
            part = self._engine.ordinal(self._cardinal(denominator)) + ("" if numerator == 1 else "s")
        if whole is None:
            return f"{self._cardinal(numerator)} {part}"
        if numerator == 1 and denominator in (2, 4):
            return f"{self._number(whole)} and a {part}"
        return f"{self._number(whole)} and {self._cardinal(numerator)} {part}"

    def _is_size(self, match: re.Match[str]) -> bool:
        """Whether a number with its unit says what kind of thing follows: a five dollar bill."""
        before, after = self._get_before(match), self._get_after(match)
        return (
            before.lower() in ARTICLES
            and re.fullmatch(r"[a-z]+[.,;:!?]*", after) is not None
            and _get_core(after) not in NO_THINGS
        )

    # Rules

    def _read_fraction(self, match: re.Match[str]) -> str:
        numerator, denominator = int(match[1]), int(match[2])
        if denominator == 0 or self._get_before(match).lower() in ("on", "scored", "rated", "rating", "score"):
            cue = self._get_before(match).lower() == "on" and 0 < denominator <= 31 and 0 < numerator <= 12
            return (
                f"{MONTHS[numerator - 1]} {self._ordinal(match[2])}"
                if cue
                else f"{self._cardinal(numerator)} out of {self._cardinal(denominator)}"
            )
        if numerator == denominator and numerator > 9:
            return f"{self._cardinal(numerator)} {self._cardinal(denominator)}"
        return self._mixed(None, numerator, denominator)

    def _read_number(self, match: re.Match[str]) -> str:
        sign, number = match[1], match[2]
        # A hyphen after a word joins the two.
        minus = "minus " if sign and (match.start() == 0 or match.string[match.start() - 1] in " ([$=") else sign
        before = self._get_before(match)
        if re.fullmatch(r"1\d\d\d|20\d\d", number) and not minus and self._is_year(match):
            return self._year(int(number))
        if before.lower() in CALLS and number in SERVICES:
            return self._digits(number)
        if before in RELEASED and re.fullmatch(r"\d+\.\d+", number):
            return self._read_version(match)
        if minus == "-":
            minus = " "
        return minus + self._number(number)

    def _is_year(self, match: re.Match[str]) -> bool:
        before, after = self._get_before(match), _get_core(self._get_after(match))
        if before.lower() in YEAR_CUES or before in MONTHS:
            return not (after.endswith("s") and after not in ("was", "is", "has", "as", "this", "his", "its"))
        if match[2].startswith("10"):
            return False
        return not after.endswith("s") or after in ("was", "is", "has", "as", "this", "his", "its")

    def _read_date(self, match: re.Match[str], year: str, month: str, day: str) -> str:
        if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
            return match[0]
        number = int(year) if len(year) == 4 else int(year) + (2000 if int(year) < 50 else 1900)
        return f"{MONTHS[int(month) - 1]} {self._ordinal(str(int(day)))}, {self._year(number)}"

    def _read_month_first(self, match: re.Match[str]) -> str:
        if not 1 <= int(match[2]) <= 31:
            return match[0]
        year = f", {self._year(int(match[3]))}" if match[3] else ""
        return f"{_get_month(match[1])} {self._ordinal(match[2])}{year}"

    def _read_day_first(self, match: re.Match[str]) -> str:
        if not 1 <= int(match[1]) <= 31:
            return match[0]
        year = f", {self._year(int(match[3]))}" if match[3] else ""
        return f"the {self._ordinal(match[1])} of {_get_month(match[2])}{year}"

    def _read_day_after_month(self, match: re.Match[str]) -> str:
        if not self._left or self._left[-1] not in MONTHS or not 1 <= int(match[1]) <= 31:
            return match[0]
        # "In May 5 people came."
        if (
            self._right
            and self._right[0].islower()
            and not match[2]
            and self._right not in _AFTER_DATES
            and match.end() == len(match.string)
        ):
            return match[0] if self._left[-1] == "May" and self._left[:-1] == ["in"] else self._ordinal(match[1])
        year = f", {self._year(int(match[2]))}" if match[2] else ""
        return f"{self._ordinal(match[1])}{year}"

    def _read_days_after_month(self, match: re.Match[str]) -> str:
        if not self._left or self._left[-1] not in MONTHS or not all(1 <= int(day) <= 31 for day in match.groups()):
            return match[0]
        return f"{self._ordinal(match[1])} to {self._ordinal(match[2])}"

    def _clock(self, hour: str, minute: str | None, half: str | None) -> str:
        words = self._number(str(int(hour)))
        if minute == "00":
            words += "" if half else " o'clock" if 1 <= int(hour) <= 12 else " hundred hours"
        elif minute is not None:
            words += (" oh " if minute[0] == "0" else " ") + self._number(str(int(minute)))
        return words + (f" {half.upper()} M" if half else "")

    def _read_time(self, match: re.Match[str]) -> str:
        hour, minute, second, half = match[1], match[2], match[3], match[4]
        if int(hour) > 24 or int(minute) > 59:
            return f"{self._number(str(int(hour)))} to {self._number(str(int(minute)))}"
        if second is not None:
            words = f"{self._number(str(int(hour)))} {self._clock_part(minute)} {self._clock_part(second)}"
            return words + (f" {half.upper()} M{self._get_stop(match)}" if half else "")
        return self._clock(hour, minute, half) + self._get_stop(match)

    def _clock_part(self, digits: str) -> str:
        return ("oh " if digits[0] == "0" and digits != "00" else "") + self._number(str(int(digits)))

    def _read_time_range(self, match: re.Match[str]) -> str:
        first, second = self._clock(match[1], match[2], "x")[:-4], self._clock(match[3], match[4], match[5])
        return f"{first} to {second}{self._get_stop(match)}"

    def _money(self, sign: str, number: str, scale: str | None) -> str:
        main, small = CURRENCIES[sign]
        if scale is not None:
            return f"{self._number(number)} {scale} {self._plural(main)}"
        whole, point, cents = number.replace(",", "").partition(".")
        if not point or len(cents) != 2 or small is None:
            return self._count(number, main)
        parts = [self._count(whole, main)] if whole.strip("0") else []
        if cents.strip("0"):
            parts.append(self._count(cents.lstrip("0"), small))
        return " and ".join(parts) or self._count("0", main)

    def _read_money(self, match: re.Match[str]) -> str:
        scale = match[4] or (SCALES[match[5]] if match[5] else None)
        words = self._money(match[2], match[3], scale)
        if self._is_size(match) and "." not in match[3]:
            words = f"{self._number(match[3])} {scale + ' ' if scale else ''}{CURRENCIES[match[2]][0]}"
        rest = match.string[match.end() :]
        # A price before a noun: a five-dollar bill.
        return f"{'minus ' if match[1] else ''}{words}" + (" " if rest[:1].isalnum() else "")

    def _read_money_range(self, match: re.Match[str]) -> str:
        scale = match[4] or (SCALES[match[5]] if match[5] else None)
        last = self._money(match[1], match[3], scale)
        return f"{self._number(match[2])} to {last}"

    def _read_size(self, match: re.Match[str]) -> str:
        return " by ".join(self._number(number) for number in match.groups() if number)

    def _read_decade(self, match: re.Match[str]) -> str:
        number = int(match[1])
        if len(match[1]) == 3 or number % 10:
            return match[0]
        words = self._year(number) if number >= 1000 else self._cardinal(number)
        return f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"

    def _read_unit(self, match: re.Match[str]) -> str:
        sign, number, last, space, unit = match[1], match[2], match[3], match[4], match[5]
        if space and unit not in SPACED_UNITS and unit not in CLOSE_UNITS:
            return match[0]
        if not space and (unit in ("B", "K", "M", "A", "t") or (unit == "s" and "." not in number)):
            return match[0]
        noun = UNITS[unit]
        stop = match[6] and (not self._get_after(match) or self._get_after(match)[0].isupper())
        words = f"{self._number(number)} {noun}" if self._is_size(match) else self._count(last or number, noun)
        if last is not None:
            words = f"{self._number(number)} to {words}"
        elif sign and (match.start() == 0 or match.string[match.start() - 1] == " "):
            words = f"minus {words}"
        return words + ("." if stop else "")

    def _read_year_range(self, match: re.Match[str]) -> str:
        first, last = int(match[1]), match[2]
        if not 1000 <= first <= 2099 or len(last) == 3:
            return f"{self._number(match[1])} to {self._number(last)}"
        words = (
            self._year(int(last))
            if len(last) == 4
            else ("oh " if last[0] == "0" else "") + self._number(str(int(last)))
        )
        return f"{self._year(first)} to {words}"

    def _read_phone(self, match: re.Match[str]) -> str:
        groups = re.findall(r"\d+", match[0])
        words = ", ".join(self._digits(group) for group in groups)
        return f"plus {words}" if match[0].startswith("+") else words

    def _read_version(self, match: re.Match[str]) -> str:
        numbers = re.findall(r"\d+", match[0])
        words = " point ".join(self._number(number) for number in numbers)
        if len(numbers) == 4 and match[0][0].isdigit():
            words = " dot ".join(self._number(number) for number in numbers)
        return f"version {words}" if match[0][0] in "vV" else words

    def _read_address(self, match: re.Match[str]) -> str:
        text = re.sub(r"^https?://", "", match[0])
        parts = re.findall(r"[A-Za-z]+|\d+|[^\w\s]|_", text)
        words = []
        for index, part in enumerate(parts):
            if part.isdigit():
                words.append(self._number(part) if len(part) < 5 else self._digits(part))
            elif part.isalpha():
                is_word = part.lower() in DOMAIN_WORDS or (
                    len(part) > 3 and re.search("[aeiouyAEIOUY]", part) is not None
                )
                is_word = is_word or (len(part) == 3 and re.fullmatch("(?i)[^aeiou][aeiouy][a-z]", part) is not None)
                is_word = is_word or (
                    len(part) == 2 and part.lower() in ("me", "us", "my", "in", "to", "go", "it", "we", "at")
                )
                is_last_domain = index and parts[index - 1] == "." and part.lower() in ("me", "us", "in", "it", "at")
                words.append(part.lower() if is_word and not is_last_domain else " ".join(part.upper()))
            else:
                words.append(ADDRESS_SIGNS.get(part, ""))
        return " ".join(word for word in words if word)

    def _read_path(self, match: re.Match[str]) -> str:
        if re.fullmatch(r"[\d/.]+", match[0]) or not re.match(r"/", match[0]):
            return match[0]
        return self._read_address(match)

    def _read_code(self, match: re.Match[str]) -> str:
        """Letters and digits in one word: MP3, COVID-19, 5G."""
        if re.fullmatch(r"\d+[A-Z]", match[0]) and match[0][-1] in "XY":
            return f"{self._number(match[0][:-1])} {match[0][-1]}"
        words = []
        for part in re.findall(r"[A-Za-z]+|\d+", match[0]):
            if part.isdigit():
                words.append(self._number(part) if len(part) < 5 else self._digits(part))
            else:
                is_spelled = part.isupper() and not (part in WORD_ACRONYMS or (len(part) > 3 and self._is_word(part)))
                words.append(" ".join(part) if is_spelled else part.capitalize() if part.isupper() else part)
        return " ".join(words)

    @staticmethod
    def _is_word(letters: str) -> bool:
        """Whether capitals can be read as a word: vowels among consonants, not too many of these in a row."""
        return letters not in LETTER_ACRONYMS and re.search("[AEIOUY]", letters) is not None and re.search(
            "[^AEIOUY]{4}|^[^AEIOUY]{3}(?<!SCH)(?<!STR)|[AEIOU]{3}", letters
        ) is None  # fmt: skip

    def _read_initials(self, match: re.Match[str]) -> str:
        core = match[0].rstrip(".")
        known = ABBREVIATIONS.get(core)
        stop = self._get_stop(match)
        if core.lower() in ("e.g", "i.e"):
            return "For example" if core[0] == "E" else "That is" if core[0] == "I" else ABBREVIATIONS[core.lower()]
        if known is None:
            known = " ".join(core.replace(".", "").upper())
            # Initials of a name, and a country before a noun in capitals, end no sentence.
            stop = stop if not self._get_after(match) else ""
        return known + stop

    def _read_abbreviation(self, match: re.Match[str]) -> str:
        core, has_stop = match[1], match[2] == "."
        before, after = self._get_before(match), self._get_after(match)
        stop = self._get_stop(match)
        if (not has_stop and core not in BARE) or (core == "M" and before in ("A", "P")):
            return match[0]
        if core in ("St", "Dr", "Ct", "Sq"):
            is_start = (not self._left and not match.string[: match.start()].strip()) or (
                len(self._left) < 2 and not match.string[: match.start()].strip()
            )
            is_street = (
                (before[:1].isupper() and not is_start and before not in TITLES)
                or before[:1].isdigit()
                or (before.endswith(("st", "nd", "rd", "th")) and before[:1].isdigit())
            )
            if is_street and (core != "Dr" or not after[:1].isupper() or match.string[: match.start()].strip()):
                return STREETS[core] + stop
            return {"St": "Saint"}.get(core) or TITLES.get(core) or STREETS[core]
        if core in TITLES and (
            after[:1].isupper() or core not in ("Gen", "Rep", "Pres", "Hon", "Col", "Ft", "Mt", "Fr", "Sen")
        ):
            return TITLES[core]
        if core in SHORT_MONTHS and has_stop and core != "May":
            return SHORT_MONTHS[core] + (stop if not after else "")
        if core in SHORT_DAYS and has_stop and core not in ("Sun", "Sat"):
            return SHORT_DAYS[core] + (stop if not after else "")
        if (
            core in ("Sun", "Sat")
            and has_stop
            and (not after or after[:1].isdigit() or after[:1].islower())
            and before.lower() in ("on", "", "and", "to")
        ):
            return SHORT_DAYS[core] + (stop if not after else "")
        if len(core) == 1 and core.isupper() and has_stop and after[:1].isupper() and core != "I":
            return core
        if core in ("max", "min", "al", "ed", "co", "est", "Co", "Sec", "art") and has_stop and not after:
            return match[0]
        if core in ABBREVIATIONS and core not in TITLES:
            return ABBREVIATIONS[core] + stop
        return match[0]

    def _read_capitals(self, match: re.Match[str]) -> str:
        word = match[0]
        if word in SAID:
            return SAID[word]
        suffix = "'s" if re.search("[A-Z]'?s$", word) and not word.endswith("S") else ""
        core = re.sub("'?s$", "", word) if suffix else word
        before = self._get_before(match)
        if core in SAID:
            return SAID[core] + suffix
        value = _get_roman_value(core)
        if value is not None and not suffix.startswith("s") and self._is_numeral(core, before, match):
            words = self._cardinal(value)
            is_counted = before in COUNTED or before.isdigit() or before.isupper()
            return (words if is_counted else f"the {self._engine.ordinal(words)}") + suffix
        if not core.isupper():
            # Two words in one, such as YouTube, and brand names.
            return word
        if core in WORD_ACRONYMS or (len(core) > 3 and self._is_word(core)):
            return core.capitalize() + suffix
        return " ".join(core) + suffix

    def _read_first(self, match: re.Match[str]) -> str:
        if not _is_first_of_name(self._left):
            return match[0]
        return "the first" if self._left[0] in RULERS else "one"

    def _is_numeral(self, core: str, before: str, match: re.Match[str]) -> bool:
        if len(core) == 1:
            return before in COUNTED
        return (
            before[:1].isupper()
            and before.isalpha()
            and core
            not in (
                "DC",
                "MD",
                "CD",
                "MC",
                "DI",
                "MIX",
                "CIVIL",
                "CC",
                "CV",
                "DM",
                "MD",
                "LL",
                "MM",
                "ML",
                "XL",
                "XXL",
                "LCD",
                "DVD",
            )
        )

    @staticmethod
    def _is_choice(match: re.Match[str]) -> bool:
        before = re.search(r"[A-Za-z]+$", match.string[: match.start()])
        return before is not None and before[0].islower()

    def _read_symbol(self, match: re.Match[str]) -> str:
        known = {"<=": "at most", ">=": "at least"}
        # Control tokens and tags spelled out are nobody's inequality.
        if match[0] in "<>" and re.search(r"</?\w+/?>", match.string):
            return match[0]
        return f" {known.get(match[0]) or SYMBOLS[match[0]]} "


_AFTER_DATES = frozenset(
    [
        "was",
        "is",
        "at",
        "in",
        "on",
        "and",
        "or",
        "to",
        "the",
        "we",
        "he",
        "she",
        "it",
        "they",
        "i",
        "for",
        "from",
        "by",
        "with",
        "of",
        "as",
        "until",
    ]
)


def _get_core(word: str) -> str:
    """A word without the marks around it."""
    match = _CORE.match(word.strip())
    return match[1] if match else word


def _has_capitals(core: str) -> bool:
    """Whether a word has capitals beyond those of a name: FBI, but not McDonald."""
    return core.isupper() or re.fullmatch(r"[A-Z]{2,}'?s", core) is not None


def _is_first_of_name(before: list[str]) -> bool:
    """Whether an I after these words is a number."""
    if len(before) < 2 or not before[1].istitle() or not before[1].isalpha():
        return False
    return (
        before[0] in RULERS
        or before == ["World", "War"]
        or before[1] in ("Chapter", "Volume", "Act", "Phase", "Appendix")
    )


def _get_month(text: str) -> str:
    return SHORT_MONTHS.get(text, text)


def _get_roman_value(text: str) -> int | None:
    if re.fullmatch("M{0,3}(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})", text) is None or not text:
        return None
    values = [ROMAN_VALUES[letter] for letter in text]
    return sum(-value if value < after else value for value, after in zip(values, [*values[1:], 0], strict=True))


def _fold(word: str) -> str:
    """A word in the letters of English."""
    if word.isascii():
        return word
    letters = unicodedata.normalize("NFD", word.translate(LETTER_FOLDS))
    return unicodedata.normalize("NFC", "".join(letter for letter in letters if not "\u0300" <= letter <= "\u036f"))


__all__ = ["EnglishNormalizer", "is_available"]
