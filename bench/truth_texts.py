"""The texts of the truth test: some hundred short ones of a kind, which share a beginning; the same on every machine
with the same Python."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path


def _listed(words: str) -> list[str]:
    return words.split()


COUNT = 400
"""Texts of a kind."""

WORDS = _listed(
    "time year people way day man thing woman life child world school state family student group country problem hand"
    " part place case week company system program question work government number night point home water room mother"
    " area money story fact month lot right study book eye job word business issue side kind head house service friend"
    " father power hour game line end member law car city community name president team minute idea kid body"
    " information back parent face others level office door health person art war history party result change morning"
    " reason research girl guy moment air teacher force education"
)


def numbers() -> list[str]:
    """Whole numbers of up to six digits, as many of each length, smaller ones more often."""
    return [f"x={int(10 ** (6 * i / COUNT))}\n" for i in range(COUNT)]


def python() -> list[str]:
    """Lines of the standard library, each after a line's end, with its indentation."""
    lines: list[str] = []
    for module in ("argparse", "shutil", "tarfile", "textwrap"):
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        lines += [line.rstrip() for line in Path(spec.origin).read_text().splitlines() if line.strip()]
    return [f"pass\n{line}\n" for line in evenly([line for line in lines if len(line) < 90])]


def prose() -> list[str]:
    """What follows "of the" in Python's manual."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())
    return [f"of the{found}\n" for found in evenly(re.findall(r"(?<=\bof the)(?: [^ ]+){3}", text))]


def markdown() -> list[str]:
    """Lines with lists, headings, tables, code and links, after another line."""
    draw = random.Random(0)

    def words(most: int = 3) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    forms: list[Callable[[], str]] = [
        lambda: f"\n\n{'#' * draw.randint(1, 4)} {words().title()}\n\n",
        lambda: f"\n{'  ' * draw.randint(0, 3)}{draw.choice('-*+')} {words()}\n",
        lambda: f"\n{'    ' * draw.randint(0, 2)}- [{draw.choice(' x')}] {words()}\n",
        lambda: f"\n{'   ' * draw.randint(0, 1)}{draw.randint(1, 12)}. {words()}\n",
        lambda: f"\n\n| {words(1)} | {words(1)} |\n| --- | ---: |\n",
        lambda: f"\n\n```{draw.choice(['', 'python', 'sh'])}\n{words(1)} = {words(1)}\n```\n",
        lambda: f"\n\n    {words(1)}({words(1)})\n",
        lambda: f" [{words()}](https://{words(1)}.org/{words(1)})\n",
        lambda: f" **{words()}** {words()}\n",
        lambda: f" `{words(1)}_{words(1)}` {words()}.\n\n",
        lambda: f"\n> {words()}\n",
    ]
    return ["as follows:" + draw.choice(forms)() for _ in range(COUNT)]


def chinese() -> list[str]:
    """Sentences made of a who, a when, a what and a number."""
    draw = random.Random(1)
    who = _listed("我 他 她 我们 你们 他们 老师 学生 医生 朋友 妈妈 爸爸 孩子 同事 经理 作家 记者 工程师 科学家 大家")
    when = _listed("今天 昨天 明天 去年 每天 早上 晚上 现在 刚才 以后 上个星期 二〇二四年 2024年 10月1日")
    verb = _listed("喜欢 学习 研究 看见 知道 需要 购买 使用 讨论 准备 忘记 介绍 参加 完成 选择")
    what = _listed(
        "知识 语言 模型 苹果 电影 问题 音乐 历史 数学 天气 新闻 工作 城市 文化 经济 技术 计算机 自行车 图书馆"
        " 人工智能 龘字 饕餮"
    )
    mark = _listed("。 ！ ？ ， ；")

    def sentence() -> str:
        first, second = draw.choice(who), draw.choice(when)
        start = draw.choice([first + second, second + first, first])
        return f"{start}{draw.choice(verb)}{draw.choice(what)}{draw.choice(mark)}"

    return [f"他说：{sentence()}\n" for _ in range(COUNT)]


def emoji() -> list[str]:
    """Chat in several scripts, with emoji of one and of several characters."""
    draw = random.Random(2)
    signs = _listed("😀 😂 ❤️ 👍 👍🏽 🎉 🔥 👩‍👩‍👧 🇩🇪 🇯🇵 ☕ ✅ 🤷‍♀️ 🚀 ✨")
    words = [*WORDS[:40], *_listed("ja schön größer café naïve да нет привет はい ありがとう 好的 谢谢 شكرا हाँ")]

    def message() -> str:
        parts = [draw.choice(signs if draw.random() < 0.5 else words) for _ in range(draw.randint(2, 4))]
        return "".join(draw.choice(["", " ", " ", "  "]) + part for part in parts) + draw.choice(
            ["", "!", "...", " :)"]
        )

    return [f"ok{message()}\n" for _ in range(COUNT)]


def evenly(texts: list[str]) -> list[str]:
    """`COUNT` of the texts, at equal distances."""
    return [texts[i * len(texts) // COUNT] for i in range(COUNT)]


KINDS: dict[str, Callable[[], list[str]]] = {
    "numbers": numbers,
    "Python": python,
    "prose": prose,
    "Markdown": markdown,
    "Chinese": chinese,
    "emoji": emoji,
}
