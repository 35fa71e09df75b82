"""
Small Python problems with solutions and asserts, made by rule and kept only if they run: a stand-in for the synthetic
code of To Code, or Not To Code (arXiv 2408.10914), which was written by a model and never published. This is not model
output, and far less varied.

A problem is a chain of one to four steps out of STEPS, each of which is written down twice: as an expression and as
statements. The solution takes one form of every step; what the asserts expect is computed with the other one. The two
are compared where no harm is done (sandbox.py), and what fails, raises or takes too long is left out and counted: a
largest item is asked of lists that a step before may have emptied, for example.
"""

import random
from collections import Counter

import sandbox

# from, to, what it does, word for a name, expression, statements; x is what goes in, y what comes out, K a number
STEPS = [
    ("ints", "ints", "keep the even ones", "even", "[n for n in x if n % 2 == 0]",
     "y = []\nfor n in x:\n    if not n % 2:\n        y.append(n)"),
    ("ints", "ints", "keep the odd ones", "odd", "[n for n in x if n % 2]",
     "y = []\nfor n in x:\n    if n % 2 == 1:\n        y.append(n)"),
    ("ints", "ints", "keep those above K", "above", "[n for n in x if n > K]",
     "y = list(x)\nfor n in x:\n    if n <= K:\n        y.remove(n)"),
    ("ints", "ints", "drop those that K divides", "indivisible", "[n for n in x if n % K != 0]",
     "y = []\nfor n in x:\n    if n % K == 0:\n        continue\n    y.append(n)"),
    ("ints", "ints", "square each of them", "square", "[n * n for n in x]", "y = []\nfor n in x:\n    y.append(n**2)"),
    ("ints", "ints", "add K to each of them", "increase", "[n + K for n in x]",
     "y = list(x)\nfor i in range(len(y)):\n    y[i] += K"),
    ("ints", "ints", "take the absolute value of each", "absolute", "[abs(n) for n in x]",
     "y = []\nfor n in x:\n    y.append(n if n >= 0 else -n)"),
    ("ints", "ints", "reverse their order", "reverse", "x[::-1]", "y = []\nfor n in x:\n    y.insert(0, n)"),
    ("ints", "ints", "sort them in increasing order", "sort", "sorted(x)",
     "y = list(x)\nfor i in range(1, len(y)):\n    j = i\n    while j > 0 and y[j - 1] > y[j]:\n"
     "        y[j - 1], y[j] = y[j], y[j - 1]\n        j -= 1"),
    ("ints", "ints", "sort them from the largest to the smallest", "descend", "sorted(x, reverse=True)",
     "y, rest = [], list(x)\nwhile rest:\n    largest = max(rest)\n    rest.remove(largest)\n    y.append(largest)"),
    ("ints", "ints", "leave out what came before", "unique", "list(dict.fromkeys(x))",
     "y, seen = [], set()\nfor n in x:\n    if n not in seen:\n        seen.add(n)\n        y.append(n)"),
    ("ints", "ints", "replace each by the sum of all up to it", "running_sum",
     "[sum(x[: i + 1]) for i in range(len(x))]", "y, total = [], 0\nfor n in x:\n    total += n\n    y.append(total)"),
    ("ints", "ints", "take the difference of each and the one before", "differences",
     "[b - a for a, b in zip(x, x[1:])]", "y = []\nfor i in range(1, len(x)):\n    y.append(x[i] - x[i - 1])"),
    ("ints", "ints", "take the first K", "first", "x[:K]",
     "y = []\nfor n in x:\n    if len(y) == K:\n        break\n    y.append(n)"),
    ("ints", "ints", "leave out the first K", "rest", "x[K:]",
     "y = list(x)\nfor _ in range(min(K, len(x))):\n    y.pop(0)"),
    ("ints", "ints", "move the last one to the front", "rotate", "x[-1:] + x[:-1]",
     "y = list(x)\nif y:\n    y.insert(0, y.pop())"),
    ("ints", "int", "return their sum", "total", "sum(x)", "y = 0\nfor n in x:\n    y += n"),
    ("ints", "int", "return how many there are", "count", "len(x)", "y = 0\nfor _ in x:\n    y += 1"),
    ("ints", "int", "return the largest", "largest", "max(x)",
     "y = x[0]\nfor n in x[1:]:\n    if n > y:\n        y = n"),
    ("ints", "int", "return the smallest", "smallest", "min(x)", "y = sorted(x)[0]"),
    ("ints", "int", "return the second largest of the different ones", "second", "sorted(set(x))[-2]",
     "rest = [n for n in x if n != max(x)]\ny = max(rest)"),
    ("ints", "int", "return where the largest first stands", "place_of_largest", "x.index(max(x))",
     "y = 0\nfor i in range(len(x)):\n    if x[i] > x[y]:\n        y = i"),
    ("ints", "int", "return the distance from the smallest to the largest", "spread", "max(x) - min(x)",
     "ordered = sorted(x)\ny = ordered[-1] - ordered[0]"),
    ("ints", "bool", "tell whether they never decrease", "is_sorted", "all(a <= b for a, b in zip(x, x[1:]))",
     "y = True\nfor i in range(len(x) - 1):\n    if x[i] > x[i + 1]:\n        y = False"),
    ("ints", "bool", "tell whether one of them comes twice", "has_duplicate", "len(set(x)) < len(x)",
     "y, seen = False, []\nfor n in x:\n    if n in seen:\n        y = True\n    seen.append(n)"),
    ("ints", "words", "write each of them as text", "texts", "[str(n) for n in x]", "y = list(map(str, x))"),
    ("int", "int", "multiply it by K", "times", "x * K", "y = 0\nfor _ in range(K):\n    y += x"),
    ("int", "int", "return the sum of its digits", "digit_sum", "sum(int(d) for d in str(abs(x)))",
     "y, left = 0, abs(x)\nwhile left:\n    left, digit = divmod(left, 10)\n    y += digit"),
    ("int", "int", "return its remainder when divided by K", "remainder", "x % K", "y = x - x // K * K"),
    ("int", "bool", "tell whether it is prime", "is_prime", "x > 1 and all(x % d for d in range(2, int(x**0.5) + 1))",
     "y, d = x > 1, 2\nwhile d * d <= x:\n    if x % d == 0:\n        y = False\n        break\n    d += 1"),
    ("int", "ints", "list its positive divisors in increasing order", "divisors",
     "[d for d in range(1, abs(x) + 1) if x % d == 0]",
     "y, d = [], 1\nwhile d <= abs(x):\n    if abs(x) // d * d == abs(x):\n        y.append(d)\n    d += 1"),
    ("int", "ints", "list the digits of its absolute value", "digits", "[int(d) for d in str(abs(x))]",
     "y, left = [], abs(x)\nwhile left >= 10:\n    left, digit = divmod(left, 10)\n    y.insert(0, digit)\n"
     "y.insert(0, left)"),
    ("int", "text", "write it in binary", "binary", "bin(x)[2:] if x >= 0 else '-' + bin(x)[3:]", "y = format(x, 'b')"),
    ("text", "text", "turn it around", "backwards", "x[::-1]", "y = ''\nfor c in x:\n    y = c + y"),
    ("text", "text", "write it in capital letters", "capitals", "x.upper()", "y = ''.join(c.upper() for c in x)"),
    ("text", "text", "remove its vowels", "without_vowels", "''.join(c for c in x if c.lower() not in 'aeiou')",
     "y = x\nfor vowel in 'aeiouAEIOU':\n    y = y.replace(vowel, '')"),
    ("text", "text", "keep only its letters", "letters", "''.join(c for c in x if c.isalpha())",
     "y = ''\nfor c in x:\n    if c.isalpha():\n        y += c"),
    ("text", "text", "repeat it K times", "repeat", "x * K", "y = ''\nfor _ in range(K):\n    y += x"),
    ("text", "text", "leave out every character that equals the one before", "squeeze",
     "''.join(c for i, c in enumerate(x) if i == 0 or c != x[i - 1])",
     "y = ''\nfor c in x:\n    if not y or y[-1] != c:\n        y += c"),
    ("text", "int", "return its length", "length", "len(x)", "y = 0\nfor _ in x:\n    y += 1"),
    ("text", "int", "count its vowels", "vowels", "sum(c in 'aeiou' for c in x.lower())",
     "y = 0\nfor vowel in 'aeiou':\n    y += x.lower().count(vowel)"),
    ("text", "bool", "tell whether it reads the same backwards", "is_palindrome", "x == x[::-1]",
     "y = True\nfor i in range(len(x) // 2):\n    if x[i] != x[-1 - i]:\n        y = False"),
    ("text", "words", "split it into words", "words", "x.split()",
     "y, word = [], ''\nfor c in x + ' ':\n    if c != ' ':\n        word += c\n    elif word:\n"
     "        y.append(word)\n        word = ''"),
    ("text", "counts", "count how often every character comes", "frequencies", "{c: x.count(c) for c in x}",
     "y = {}\nfor c in x:\n    y[c] = y.get(c, 0) + 1"),
    ("words", "words", "sort them by length, then by the alphabet", "by_length", "sorted(x, key=lambda w: (len(w), w))",
     "y = sorted(x)\ny.sort(key=len)"),
    ("words", "words", "keep those with more than K letters", "long", "[w for w in x if len(w) > K]",
     "y = []\nfor w in x:\n    if len(w) >= K + 1:\n        y.append(w)"),
    ("words", "words", "turn each around", "each_backwards", "[w[::-1] for w in x]",
     "y = []\nfor w in x:\n    y.append(''.join(reversed(w)))"),
    ("words", "text", "join them with hyphens", "hyphenate", "'-'.join(x)",
     "y = ''\nfor i, w in enumerate(x):\n    y += ('-' if i else '') + w"),
    ("words", "text", "return their first letters as one text", "initials", "''.join(w[0] for w in x)",
     "y = ''\nfor w in x:\n    y += w[:1]"),
    ("words", "text", "return the longest, the first one if several are", "longest", "max(x, key=len)",
     "y = x[0]\nfor w in x:\n    if len(w) > len(y):\n        y = w"),
    ("words", "ints", "list their lengths", "lengths", "[len(w) for w in x]", "y = list(map(len, x))"),
    ("words", "counts", "count how often each comes", "word_counts", "{w: x.count(w) for w in x}",
     "y = {}\nfor w in x:\n    if w not in y:\n        y[w] = 0\n    y[w] += 1"),
    ("counts", "int", "return the highest count", "highest_count", "max(x.values())",
     "y = 0\nfor n in x.values():\n    y = max(y, n)"),
    ("counts", "words", "list what comes once, sorted", "once", "sorted(k for k, n in x.items() if n == 1)",
     "y = []\nfor k in x:\n    if x[k] == 1:\n        y.append(k)\ny.sort()"),
]  # fmt: skip
TAKES = {
    "ints": ("a list of integers", ("numbers", "values", "items", "nums", "xs")),
    "int": ("an integer", ("n", "number", "value", "x")),
    "text": ("a text", ("text", "s", "string", "line")),
    "words": ("a list of words", ("words", "names", "tokens", "strings")),
}
WORDS = ("river", "stone", "level", "quiet", "garden", "civic", "window", "orange", "apple", "radar", "paper", "noon",
         "simple", "yellow", "machine", "is", "a", "to")  # fmt: skip
CHUNK = 1000  # problems


def problem(seed, number):
    """A program: statement, solution and asserts as one text; None if the form that computes what the asserts expect
    raised. A pure function of its arguments."""
    dice = random.Random(f"synthetic/{seed}/{number}")
    steps, kind = [], dice.choice(list(TAKES))
    takes = kind
    for _ in range(dice.choice((1, 2, 2, 3, 3, 4))):
        if fitting := [step for step in STEPS if step[0] == kind and step not in steps]:
            steps.append(dice.choice(fitting))
            kind = steps[-1][1]
    numbers = [str(dice.randint(2, 9)) for _ in steps]
    forms = [dice.random() < 0.5 for _ in steps]
    name = "_".join(dict.fromkeys(step[3] for step in steps))
    about, names = TAKES[takes]
    argument = dice.choice(names)
    solution = function(name, argument, steps, numbers, forms)
    other = {}
    exec(function(name, argument, steps, numbers, [not form for form in forms]), other)  # our own text
    asserts = []
    for _ in range(dice.randint(3, 5)):
        value = an_input(takes, dice)
        try:
            asserts.append(f"assert {name}({value!r}) == {other[name](value)!r}")
        except Exception:
            return None
    does = [step[2].replace("K", number) for step, number in zip(steps, numbers, strict=True)]
    tells = ", ".join(does[:-1]) + " and " * (len(does) > 1) + does[-1]
    openings = f"Take {about}: {tells}.", f"Given {about}, {tells}.", f"Write a function of {about}: {tells}."
    opening = dice.choice(openings)
    quoted = dice.random() < 0.5
    head = f'"""\n{opening}\n"""\n' if quoted else f"# {opening}\n"
    return head + solution + "\n\n" + "\n".join(asserts) + "\n"


def function(name, argument, steps, numbers, as_statements):
    """Source of a function of the steps, each in one of its forms."""
    lines, last = [], argument
    for i, (step, number, statements) in enumerate(zip(steps, numbers, as_statements, strict=True)):
        made = "result" if i + 1 == len(steps) else f"{step[3].split('_')[0]}_{i + 1}"
        text = step[5] if statements else f"y = {step[4]}"
        lines += [renamed(line, {"x": last, "y": made, "K": number}) for line in text.split("\n")]
        last = made
    if len(steps) == 1 and not as_statements[0]:
        return f"def {name}({argument}):\n    return {lines[0].removeprefix('result = ')}\n"
    return f"def {name}({argument}):\n" + "".join(f"    {line}\n" for line in lines) + "    return result\n"


def renamed(line, names):
    """A line of a step with its one-letter names replaced where they are names."""
    made, word = "", ""
    for c in line + " ":
        if c.isidentifier() or (word and c.isdigit()):
            word += c
        else:
            made, word = made + names.get(word, word) + c, ""
    return made[:-1]


def an_input(kind, dice):
    if kind == "ints":
        return [dice.randint(-20, 40) for _ in range(dice.randint(0 if dice.random() < 0.1 else 2, 8))]
    if kind == "int":
        return dice.randint(0, 400)
    words = dice.choices(WORDS, k=dice.randint(1, 5))
    return words if kind == "words" else " ".join(words)


def programs(seed, chunk, size=None):
    """The programs that passed of CHUNK problems, or of the first `size` of them, in a fixed order, and what became of
    all: Counter of "kept", "no answer" (the form that computes what is expected raised), "again" (as one before) and
    sandbox.py's verdicts."""
    numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)[:size]
    made = [problem(seed, number) for number in numbers]
    new = [program for program in dict.fromkeys(made) if program]
    verdicts = sandbox.run(new)
    fates = Counter({"no answer": made.count(None), "again": len(made) - made.count(None) - len(new)})
    fates += Counter("kept" if verdict == "passed" else verdict for verdict in verdicts)
    return [program for program, verdict in zip(new, verdicts, strict=True) if verdict == "passed"], fates
