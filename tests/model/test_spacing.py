"""What characters say about the space between a text and its target."""

import pytest

from ultraedit_kernels.model.spacing import needs_space

SPACED = [
    ("The capital of Australia is", "Sydney"),
    ("Answer:", "Sydney"),
    ("There are 12", "months"),
    ("He was born on May 12", "1984"),
    ('She said "hello"', "loudly"),
    ("Émile Zola est né à", "Lyon"),
    ("한국의 수도는", "부산"),
    ("In the students'", "room"),
    ("x =", "5"),
]
JOINED = [
    ("法国的首都是", "里昂"),
    ("東京は日本の", "首都"),
    ("法国的首都是", "Lyon"),
    ("ประเทศไทยมีเมืองหลวงคือ", "เชียงใหม่"),
    ("The bridge was opened in 19", "84"),
    ('Her best known novel is "', "The Tin Orchard"),
    ("Her best known novel is “", "The Tin Orchard"),
    ("The book (", "1984"),
    ("It costs $", "40"),
    ("The capital is", ", of course, Sydney"),
    ("The capital is ", "Sydney"),
    ("The capital is", "\nSydney"),
]


@pytest.mark.parametrize(
    ("prompt", "target", "space"),
    [(*pair, True) for pair in SPACED] + [(*pair, False) for pair in JOINED],
)
def test_the_characters_on_either_side_suggest_it(prompt: str, target: str, space: bool) -> None:
    assert needs_space(prompt, target) is space
