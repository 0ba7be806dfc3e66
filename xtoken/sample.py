"""A sample of text of many kinds, made by rule, from which `PieceIndex.build` learns what two tokenizers confuse.

What they confuse is above all white space, and marks beside it. So every width of indentation, every pair of marks and
every line end is there, before words, numbers and marks; and code, data, tables, Markdown, chat and prose around them,
so that what is common in text is common here. What remains are words that neither has as one token, which each begins
with another part of them. The vocabularies themselves list the words of all languages: changed and put together, these
make such words.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .vocabulary import TokenizerLike, Vocabulary

# ruff: noqa: SIM905, since lists of short strings are easier to read as one
T = TypeVar("T")

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many off before must well back through years much where your way down should "
    "because long each just state people those too mr how little good world make very year still see own work men day "
    "get here old life both between being under three never know same last another while us might great go come since "
    "against right came take used himself few house use place during high without again home around small "
    "however found part school number water city night system program question data file model value function result "
    "example list index token text student teacher error message request server client user name type test code line "
    "page table "
    "language information development government university international different important possible available "
    "following including according performance environment application configuration implementation documentation"
).split()
CODE_WORDS = (
    "get set is has to from new init make read write open close load save parse build run test check find add remove "
    "update delete create copy move name value key index item list map node tree path file dir line text str int num "
    "len size count max min sum id url http json html xml api db sql user group config option flag state type class "
    "func method arg param self this obj ptr buf src dst tmp ctx req res err log msg error event handler callback "
    "thread lock queue stack cache hash table row col width height color image font page view model data batch loss "
    "token mask grad tensor shape device layer head base root parent child left right start end begin next prev first "
    "last old default common util helper manager factory service client server socket stream reader writer default"
).split()
SENTENCES = """\
Der schnelle braune Fuchs springt über den faulen Hund. Wir haben heute 12 Aufgaben gelöst; das war möglich, weil alle \
mitgeholfen haben. „Größere Straßen“, sagte sie, „brauchen mehr Zeit – und Geld.“
Le garçon n'a pas vu l'été passer, mais aujourd'hui il est là. « Où est-elle ? » demanda-t-on. C'est déjà 15 h 30 !
El niño corrió hacia la montaña. ¿Cómo estás? ¡Qué sorpresa! Los años pasan, según él, más rápido que antes.
Il ragazzo è andato via perché non c'era più nessuno. Le città dell'Italia sono belle; l'università è lì.
O coração não sabe o que é razão. Você já leu a informação? Amanhã haverá reunião às 10 horas.
Wszystko będzie dobrze, jeśli się postaramy. Źródło, żółw, gęś i łódź są po polsku. Czy to już koniec?
Příliš žluťoučký kůň úpěl ďábelské ódy. Tento soubor nebyl nalezen, zkuste to prosím znovu.
Det är en vacker dag i Göteborg, och människorna går på gågatan. Vi måste öppna fönstret nu. Hvor er du?
Het meisje liep naar huis, maar de deur was gesloten. Wij hebben zoiets nog nooit gezien!
Bugün hava çok güzel. Öğrenciler okula gitti mi? Şimdi değişiklikleri kaydetmek için düğmeye basın.
Kaunis päivä tänään, mutta huomenna sataa. Tiedostoa ei löytynyt. A kutya átugrik a kerítésen, és elfut.
Toate fișierele au fost șterse. Mâine mergem în oraș să cumpărăm pâine. Việt Nam là một quốc gia ở Đông Nam Á.
Съешь же ещё этих мягких французских булок, да выпей чаю. Файл не найден: проверьте путь и попробуйте снова. Это было \
в 1999 году — «давно», сказал он.
Українська мова є державною. Щоб відкрити файл, натисніть кнопку. Това е пример за текст на български език.
Η γρήγορη αλεπού πηδά πάνω από το σκυλί. Δεν βρέθηκε το αρχείο· δοκιμάστε ξανά; Καλημέρα κόσμε!
זהו משפט קצר בעברית, עם סימני פיסוק. האם הקובץ נמצא? לא, הוא נמחק אתמול.
هذا نص قصير باللغة العربية، فيه أرقام مثل ١٢٣ و 456. هل وجدت الملف؟ نعم، وجدته.
این یک متن کوتاه فارسی است؛ می‌خواهیم آن را بخوانیم. پرونده پیدا نشد.
यह हिन्दी में एक छोटा वाक्य है। क्या फ़ाइल मिली? नहीं, २०२४ में हटा दी गई थी।
এটি বাংলায় একটি ছোট বাক্য। ফাইল পাওয়া যায়নি। இது தமிழில் ஒரு சிறிய வாக்கியம். கோப்பு கிடைக்கவில்லை.
นี่คือประโยคสั้น ๆ ในภาษาไทย ไม่พบไฟล์ กรุณาลองใหม่อีกครั้ง ผู้ใช้ต้องตั้งค่าข้อมูลก่อน
敏捷的棕色狐狸跳过了懒狗。文件未找到，请检查路径后重试！“你好”，他说：《红楼梦》是一本书；价格为 12.5 元（含税）。
我們今天學習機器學習與自然語言處理，這個模型有 70 億個參數、128K 上下文。謝謝！
素早い茶色の狐がのろまな犬を飛び越える。ファイルが見つかりません。「もう一度」と言った、そして2024年に終わった。
빠른 갈색 여우가 게으른 개를 뛰어넘는다. 파일을 찾을 수 없습니다. 다시 시도해 주세요! 2024년 3월 1일입니다.""".split(
    "\n"
)
EMOJI = (
    "😀 😂 🎉 🚀 ❤️ 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ✅ ⚠️ → ← • … – — “ ” ‘ ’ « » € £ ° × ± ≤ ≥ ≠ ∞ ∑ √ π α β ™ © ½ ² № ★ │ ├── └── ═══"
).split()
MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
ENDS = (
    ": ; , . { } ( ) [ ] {} () [] }; ); }); }) )) ))) ]) ], ), }, (); ()); ] ): ]: \": ', \", ', \"), '), \") ') "
    '"); \'); "] \'] "> \'/> /> > --> */ /* /** * // # #! -- --- ... … """ \'\'\' ``` ` ? ! ?? !! ." '
    '?" !" .) ?) :) ;) .** ** __ == = += => -> && || | \\ / & % $ @ ~ ^ < <= ." )., ]. ). `. `, `: "\' "" \'\' '
    ':\' :" =\' =" (\' (" [\' [" "> }} }}> }}" }}"> %} %}> %}">'
).split()
STARTS = (
    'return x ~ word ~ The ~ 1 ~ 12 ~ x = 1 ~ # note ~ // note ~ /* note ~ * item ~ - item ~ "key": 1 ~ '
    "'a' ~ (a ~ [a ~ {a ~ } ~ }); ~ ) ~ ] ~ <div> ~ </div> ~ @app ~ $x ~ -x ~ --flag ~ | ~ = ~ .x ~ ... ~ "
    '"""Text ~ %d ~ &a ~ \\item ~ _x ~ é ~ 字 ~ я ~ 🚀 ~ • ~ : a ~ , b ~ + 1 ~ ? c ~ {{ x }} ~ {% if x %} ~ '
    "<em>a</em> ~ !d ~ ~ ~ ^"
).split(" ~ ")
LINE_ENDS = (
    *("\n", "\n\n", "\r\n", "\n\n\n", " \n", "\r\n\r\n", "  \n", "\t\n", "\n \n", "\n    \n", "\n\t\n"),
    "\n\n\n\n",
)


def sample_texts(*tokenizers: TokenizerLike) -> list[str]:
    """The texts, the same at every call; see `PieceIndex.build`.

    Parameters
    ----------
    *tokenizers
        Tokenizers, as for `Vocabulary.from_tokenizer`, of whose words to make text too: some 4 MB for a large one. They
        need not be able to encode.

    Examples
    --------
    >>> texts = sample_texts()
    >>> sum(map(len, texts)) < 2**20
    True
    >>> sample_texts(Vocabulary([b"word"]))[len(texts) :]
    ['"word/word.word(word-word_word']
    """
    return [*_texts_by_rule(), *_vocabulary_words([Vocabulary.from_tokenizer(one) for one in tokenizers])]


@functools.cache
def _texts_by_rule() -> tuple[str, ...]:
    """Those that need no tokenizer."""
    source = _Source()
    return tuple(text for maker in _MAKERS for text in maker(source))


class _Source:
    """Choices, the same at every run: only `random.Random.random` is the same in every Python."""

    def __init__(self) -> None:
        self.random = random.Random(0).random

    def one(self, values: Sequence[T]) -> T:
        return values[self.upto(len(values))]

    def upto(self, n: int) -> int:
        return int(self.random() * n)

    def words(self, n: int) -> str:
        return " ".join(self.one(WORDS) for _ in range(n))

    def sentence(self) -> str:
        text = self.words(4 + self.upto(12)).capitalize()
        if self.upto(3) == 0:
            text += self.one((", ", "; ", ": ", " - ", " (", ' "')) + self.words(3)
        return text + self.one((".", ".", ".", ".", "?", "!", "...", ".)", '."', ":"))

    def name(self) -> str:
        parts = [self.one(CODE_WORDS) for _ in range(1 + self.upto(3))]
        styles = ("_".join(parts), parts[0] + "".join(p.title() for p in parts[1:]), "".join(p.title() for p in parts))
        return self.one((*styles, styles[0], styles[0].upper(), "_" + styles[0], f"__{parts[0]}__()"))

    def value(self) -> str:
        quote = self.one("\"'")
        values = [self.name(), str(self.upto(10 ** (1 + self.upto(5)))), f"{self.upto(100)}.{self.upto(1000)}"]
        values += [f"{quote}{self.one((self.name(), self.words(2), '', '%s', '/', ', '))}{quote}"]
        values += [f"{self.name()}[{self.upto(10)}]", f"{self.name()}.{self.name()}"]
        return self.one([*values, self.one("None True null false -1 0x1F 1e-5 [] {} ()".split())])

    def expression(self, depth: int = 2) -> str:
        if depth == 0 or self.upto(3) == 0:
            return self.value()
        a, b = self.expression(depth - 1), self.expression(depth - 1)
        operator = self.one("+ - * / % == != < > <= >= && || and or in | & << ** ->".split())
        calls = f"{self.name()}({a}, {b})", f"{self.name()}({a})"
        return self.one((*calls, f"{a} {operator} {b}", f"({a}){operator}{b}"))


def _texts(lines: Iterator[str], size: int = 2000) -> Iterator[str]:
    """Lines, put together to texts."""
    text = ""
    for line in lines:
        text += line
        if len(text) >= size:
            yield text
            text = ""
    if text:
        yield text


def _indents(source: _Source) -> Iterator[str]:
    """Every width of indentation, by spaces and by tabs, before everything that lines start with."""
    widths = [" " * n for n in range(49)] + ["\t" * n for n in range(1, 13)] + [" " * n for n in range(52, 84, 4)]
    widths += ["\t ", "\t  ", " \t", "\t    ", "    \t", "        \t", " \t ", "\t\t  "]
    starts, ends = itertools.cycle(STARTS), (":", " {", ";", ",", "", ".", "(")
    return _texts(f"{source.one(ends)}\n{indent}{next(starts)}" for indent in widths for _ in range(24))


def _line_ends(source: _Source) -> Iterator[str]:
    """Everything that lines end with, before every kind of line end."""
    starts = itertools.cycle(STARTS)
    return _texts(
        source.one((source.name(), source.one(WORDS), "1"))
        + f"{gap}{end}{line_end}{' ' * (4 * source.upto(3))}{next(starts)}"
        for end, line_end, gap in itertools.product(ENDS, LINE_ENDS, ("", " "))
    )


def _gaps(source: _Source) -> Iterator[str]:
    """White space of every width within lines."""
    gaps = [" " * n for n in range(1, 41)] + ["\t" * n for n in range(1, 7)]
    gaps += [" \t", "\t ", "\u00a0", "\u3000", " \u00a0"]
    starts = itertools.cycle(STARTS)
    return _texts(source.one(WORDS) + gap + next(starts) + "\n" for gap in gaps for _ in range(16))


def _marks(source: _Source) -> Iterator[str]:
    """Every pair of marks, and some longer runs, within and between words, and at the end of lines."""
    runs = [*MARKS, *map("".join, itertools.product(MARKS, repeat=2))]
    yield from _texts(
        form.format(source.one(WORDS), run, source.name())
        for run in runs
        for form in ("{0}{1}{2} ", "{0} {1}{2} ", "{0} {1} {2}", "{0}{1}\n{2}", "\n{1}{2} ", "{0} {1}\n    {2}")
    )
    tight = [start for start in STARTS if not start[0].isalnum()]
    yield from _texts(f"{source.one(WORDS)}{end}{start} " for end in ENDS for start in tight for _ in range(2))


def _rulers(source: _Source) -> Iterator[str]:
    """Lines of one mark."""
    lengths = [*range(3, 34), 36, 40, 48, 50, 60, 64, 70, 72, 76, 78, 79, 80]
    for mark in "-=#*_~.+/":
        yield from _texts(f"{source.one(WORDS)}\n{mark * n}\n" for n in lengths)
        yield from _texts(f" {mark * n} {source.one(WORDS)}\n" for n in lengths)


"""Heads of blocks, lines, and the end of blocks; {n} is a name, {e} an expression, {w} words."""
PYTHON = (
    (
        "def {n}(self, {n}, {n}=None): ~ if {e}: ~ elif not {e}: ~ else: ~ for {n} in {e}: ~ class {n}({n}): ~ "
        "try: ~ with open({e}) as {n}: ~ except {n} as {n}: ~ while True: ~ "
        "async def {n}({n}: str) -> list[int]: ~ @property"
    ).split(" ~ "),
    (
        '{n} = {e} ~ return {e} ~ self.{n} = {e} ~ {n}({e}) ~ # {w} ~ """{w}""" ~ raise {n}({e}) ~ pass ~ '
        "import {n} ~ from {n} import {n} ~ assert {e}, '{w}' ~ print(f\"{w} {{n}}\") ~ "
        "{n} = [\n    {e},\n    {e},\n] ~ yield {e} ~ >>> {n}({e}) ~ x[{n}:, -1] = {e} ~ "
        '"""{w}\n\n    {w}\n    """ ~ {n}(\n        {e},\n    ) ~ {n}: int = {e}'
    ).split(" ~ "),
    "",
)
BRACES = (
    (
        "if ({e}) { ~ for (int {n} = 0; {n} < {n}; {n}++) { ~ } else if (!{e}) { ~ } else { ~ while ({e}) { ~ "
        "static void {n}({n} *{n}, const char **{n}) { ~ function {n}({n}, {n}) { ~ public {n} {n}() { ~ try { ~ "
        "const {n} = ({n}) => { ~ switch ({n}) { ~ fn {n}(&self, {n}: &str) -> Result<{n}, {n}> { ~ struct {n} {"
    ).split(" ~ "),
    (
        "{n} = {e}; ~ return {e}; ~ {n}({e}); ~ const {n} = {e}; ~ // {w} ~ /* {w} */ ~ case {e}: ~ break; ~ "
        "#define {n} {e} ~ int {n}; ~ {n}->{n} = {e}; ~ let mut {n} = {e}; ~ #include <{n}.h> ~ @{n} ~ "
        "{n}.{n}({e}, { ~ }); ~ import {n} from '{n}'; ~ /**\n * {w}\n * @param {n} {w}\n */ ~ {n} += {e}; ~ "
        "std::{n}<{n}> {n}; ~ console.log(`${{n}}: {w}`);"
    ).split(" ~ "),
    "}",
)
OTHERS = (
    ('if [ -n "${n}" ]; then ~ for {n} in $({n}); do ~ {n}() { ~ case "$1" in ~ begin ~ sub {n} { ~ do |{n}|').split(
        " ~ "
    ),
    (
        '{n}={e} ~ echo "{w}: ${n}" ~ export {n}=${n}/bin:$PATH ~ $ {n} --{n} -{n} {n}.txt ~ # {w} ~ '
        "my ${n} = {e}; ~ SELECT {n}, {n} FROM {n} WHERE {n} = {e}; ~ CREATE TABLE {n} (\n\t{n} INTEGER NOT NULL,\n"
        "\tPRIMARY KEY ({n})\n); ~ INSERT INTO {n} VALUES ({e}); ~ CREATE FUNCTION {n}({n}, {n})\n\tRETURNS {n} ~ "
        "\t@{n} $({n}) ~ {n}: {n}.o ~ \\begin{{n}} ~ "
        "\\item {w} ~ ({n} ({n} {e})) ~ %{n}% {w} ~ {n} := {e} ~ puts {e} ~ <?php echo ${n}; ?> ~ #!/bin/sh ~ "
        "{n}) {n} ;; ~ set({n} {e}) ~ + {w} ~ - {w} ~ @@ -1,7 +1,9 @@ ~ .{n} {\n  {n}: {e};\n} ~ "
        '<p class="{{ {n} }}_{n}"> ~ {% if {n}.{n} %}{{ {n} }}{% endif %} ~ {{"{n}"}}{{#{n}}}{w} <em>{w}</em> ~ '
        """<a href="{% {n} '{n}' %}">{{ {n} }}</a> {w} ~ """
        "#{n} > .{n}:hover { color: #fff; } ~ --{n}  {w} ~ -{n}, --{n}=FILE    {w}"
    ).split(" ~ "),
    "end",
)


def _fill(source: _Source, template: str) -> str:
    for mark, make in (("{n}", source.name), ("{e}", source.expression), ("{w}", lambda: source.words(5))):
        while mark in template:
            template = template.replace(mark, make(), 1)
    return template


def _block(source: _Source, language: tuple[list[str], list[str], str], indent: str, depth: int) -> Iterator[str]:
    heads, lines, close = language
    for _ in range(2 + source.upto(4)):
        here = indent * depth
        yield from (here + line for line in _fill(source, source.one(lines)).split("\n"))
        if depth < 8 and source.upto(4) == 0:
            yield here + _fill(source, source.one(heads))
            yield from _block(source, language, indent, depth + 1)
            if close:
                yield here + close
            yield from [""] * source.upto(3)


def _code(source: _Source) -> Iterator[str]:
    layouts = [("    ", "\n"), ("  ", "\n"), ("\t", "\n"), ("    ", "\r\n"), ("        ", "\n"), ("   ", "\n")]
    for language in (PYTHON, BRACES, OTHERS):
        for indent, end in layouts:
            for _ in range(5):
                lines = itertools.chain.from_iterable(_block(source, language, indent, 0) for _ in range(3))
                yield end.join(lines) + end


def _data(source: _Source) -> Iterator[str]:
    """JSON, YAML, XML, INI, CSV, and tables of aligned columns."""

    def nested(depth: int) -> object:
        if depth == 0 or source.upto(3) == 0:
            plain: tuple[object, ...] = (True, None, 0.5, [], {})
            return source.one((source.upto(1000), source.words(2), *plain, source.name(), "", "http://a.b/c"))
        if source.upto(3) == 0:
            return [nested(depth - 1) for _ in range(1 + source.upto(4))]
        return {source.name(): nested(depth - 1) for _ in range(1 + source.upto(4))}

    def yaml(value: object, indent: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, one in value.items():
                yield f"{indent}{key}:" + ("" if isinstance(one, (dict, list)) else f" {one}")
                yield from yaml(one, indent + "  ")
        elif isinstance(value, list):
            for one in value:
                yield f"{indent}- " + ("" if isinstance(one, (dict, list)) else f"{one}")
                yield from yaml(one, indent + "    ")

    def xml(value: object, indent: str, name: str = "item") -> Iterator[str]:
        if isinstance(value, (dict, list)) and value:
            yield f'{indent}<{name} class="{source.name()}" id="{source.name()}">'
            for key, one in value.items() if isinstance(value, dict) else [("li", one) for one in value]:
                yield from xml(one, indent + "  ", key)
            yield f"{indent}</{name}>"
        else:
            yield f"{indent}<{name}>{value}</{name}>" if value else f"{indent}<{name}/>"

    for indent in (None, 1, 2, 4, "\t"):
        for _ in range(5):
            value = {source.name(): nested(4) for _ in range(3)}
            yield json.dumps(value, indent=indent, ensure_ascii=False)
            yield "\n".join(yaml(value, ""))
            yield "\n".join(xml(value, ""))
    for separator in (",", ";", "\t", ", ", "|", " | "):
        yield "\n".join(
            separator.join((source.value(), source.words(2), str(source.upto(9999)), f"{source.random() - 0.3:.3f}"))
            for _ in range(25)
        )
    for _ in range(12):
        widths = [3 + source.upto(24) for _ in range(3)]
        yield "\n".join(
            source.name().ljust(widths[0])
            + source.words(2).rjust(widths[1])
            + f"{source.random() * 10 ** source.upto(6):{widths[2]}.2f}"
            for _ in range(20)
        )
    yield "\n".join(f"[{source.name()}]\n{source.name()} = {source.value()}\n; {source.words(4)}\n" for _ in range(30))


def _markdown(source: _Source) -> Iterator[str]:
    for _ in range(24):
        parts = [f"{'#' * (1 + source.upto(4))} {source.words(3).title()}", f"{source.sentence()} {source.sentence()}"]
        bullet = source.one("*-+")
        items = [f"{'  ' * source.upto(4)}{bullet} **{source.words(2)}**: {source.sentence()}" for _ in range(6)]
        steps = [f"{k}. {source.sentence()}\n   - `{source.name()}`: {source.words(4)}" for k in range(1, 6)]
        rows = [f"| {source.words(2)} | {source.value()} | {source.upto(100)}% |" for _ in range(5)]
        parts += map("\n".join, (items, steps, [rows[0], "|---|:---:|---:|", *rows[1:]]))
        language, name = source.one(("python", "json", "bash", "c++", "")), source.name()
        parts += [f"```{language}\n{name}({source.expression()})\n```"]
        parts += [f"> {source.sentence()}\n> {source.sentence()}", source.one(("---", "***", "===", "<br>", "* * *"))]
        title, host, path = source.words(2), source.one(WORDS), source.name()
        parts += [f"See [{title}](https://{host}.org/{path}?q={source.upto(99)}#{source.name()})"]
        parts += [f"- [ ] {source.words(3)}\n- [x] *{source.words(3)}*", f"![{source.words(2)}](./{source.name()}.png)"]
        name, title = source.name(), source.words(2)
        parts += [f".. {name}:: {title}\n\n   :{source.name()}: ``{source.name()}``\n", "$$x_{i}^2 = \\frac{a}{b}$$"]
        yield source.one(("\n\n", "\n", "\n\n\n")).join(parts)


def _prose(source: _Source) -> Iterator[str]:
    for k in range(24):
        text = " ".join(source.sentence() for _ in range(14))
        indent = " " * source.one((0, 0, 0, 1, 2, 3, 4, 8))
        yield "\n".join(textwrap.wrap(text, 40 + 5 * source.upto(9), initial_indent=indent, subsequent_indent=indent))
        yield source.one(("\n\n", "\n", "  ", "\n\n    ")).join(source.sentence() for _ in range(8 + k % 2))


def _scripts(source: _Source) -> Iterator[str]:
    for _ in range(2):
        for sentence in SENTENCES:
            words = sentence.split(" ")
            yield source.one((" ", "\n", "\n\n", "  ")).join([sentence, " ".join(source.one(words) for _ in range(40))])
        yield "\n".join(sentence[source.upto(20) :] + source.one((" ", "\n", "\t", "\n  ")) for sentence in SENTENCES)
    around = itertools.product(("", " ", "  ", "\n", "word", ". "), EMOJI, ("", " ", "word", "\n", "!"))
    yield from _texts(map("".join, around))


def _numbers(source: _Source) -> Iterator[str]:
    forms = (
        "{0} {0} {0} {0:,} {0}.5 {0:x} -{0} {0}% ${0:,}.00 {0:08d} {0:e} ({0}) [{0}] {1}:{2:02d} 20{1:02d}-0{3}-1{3} "
        "v{3}.{1}.{3} {1}.{2}.0.{3} {0}px {0}th #{0} {3}/{1}/{2}"
    ).split()

    def number() -> str:
        n = source.upto(10 ** (1 + source.upto(9)))
        return source.one(forms).format(n, n % 24, n % 60, n % 9)

    for separator in (" ", "\n", ", ", ",", "  ", "\t", " + ", "-", ": ", " = ", "\n    ", "; ", "/"):
        yield from (separator.join(number() for _ in range(60)) for _ in range(2))


def _chat(source: _Source) -> Iterator[str]:
    for _ in range(12):
        turns = []
        for who in (("User", "Assistant") if source.upto(2) else ("Q", "A")) * 3:
            answers = [source.sentence(), f"{source.sentence()}\n\n1. {source.sentence()}\n2. {source.sentence()}"]
            answers += [source.value(), f"Sure! {source.one(EMOJI)} {source.sentence()}", "I don't know, it's fine."]
            turns.append(f"{who}: {source.one(answers)}")
        yield source.one(("\n", "\n\n")).join(turns)


BEFORE_WORDS = "/.(-_"
"""Marks that stand before words without a space most often."""

FORMS: tuple[Callable[[str, str, str], str], ...] = (
    lambda word, part, mark: f"{mark}{word}",
    lambda word, part, mark: f" {word.title()}",
    lambda word, part, mark: f" {word.upper()}",
    lambda word, part, mark: f"{mark}{word.title()}",
    lambda word, part, mark: f"{mark}{word.upper()}",
    lambda word, part, mark: f" {word}{part}",
    lambda word, part, mark: f"{word}{part.title()}",
    lambda word, part, mark: f" {word[: len(part)]}{part}",
    lambda word, part, mark: f"{mark}{word[: len(part)]}{part}",
)
"""What a text makes of a word, the end of another, and a mark."""


_MAKERS = (_indents, _line_ends, _gaps, _marks, _rulers, _code, _data, _markdown, _prose, _scripts, _numbers, _chat)


def _vocabulary_words(vocabularies: Sequence[Vocabulary]) -> Iterator[str]:
    """The words of the vocabularies, each in one of `FORMS`; common ones also as they are, after marks."""
    pattern = re.compile(r"[^\W\d_][^\s\d!-/:-@\[-`{-~\ufffd]*")
    found: Counter[str] = Counter()
    for one in vocabularies:
        texts = (one[i].decode("utf-8", "replace").strip() for i in one.is_text.nonzero()[0].tolist())
        found.update(list(dict.fromkeys(filter(pattern.fullmatch, texts))))
    scripts: dict[int, list[str]] = {}
    for word in found:
        scripts.setdefault(ord(word[-1]) >> 8, []).append(word)

    def made() -> Iterator[str]:
        for words in scripts.values():
            # 9 forms, 31 marks and 5 lengths, without a common factor
            for k, (word, form, mark) in enumerate(zip(words, itertools.cycle(FORMS), itertools.cycle(MARKS[1:]))):
                yield form(word, words[7919 * k % len(words)][-1 - k % 5 :], mark)
                if found[word] == len(vocabularies) and word.isascii():
                    yield from (f"{before}{word}" for before in BEFORE_WORDS)

    return _texts(made(), 4000)
