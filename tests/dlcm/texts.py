import numpy as np

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
    "or",
    "had",
    "by",
]


def write_texts(folder, n=60, n_words=400, seed=0):
    """Text files in which a word decides the next one: a chain over words, each with its own few followers."""
    rng = np.random.default_rng(seed)
    followers = {word: rng.choice(WORDS, 3, replace=False) for word in WORDS}
    for i in range(n):
        word, text = rng.choice(WORDS), []
        for _ in range(n_words):
            word = rng.choice(followers[word])
            text.append(word)
        (folder / f"{i:03}.txt").write_text(f"{i} " + " ".join(text) + "\n")
    return folder
