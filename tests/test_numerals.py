# ruff: noqa: RUF001 (readers get true minus signs, dashes and multiplication signs)
import math

import pytest

from pvcore.numerals import Number, decimals_of, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (12, "12"),
        (1234567, "1,234,567"),
        (-2.5, "−2.50"),
        (83.42, "83.4"),
        (1234.5, "1,234"),
        (0.9996, "1.00"),
        (0.0421, "0.042"),
        (-0.00004, "−4.0e−05"),
        (None, "–"),
        (math.nan, "–"),
        (-math.inf, "−∞"),
    ],
)
def test_a_number_is_short_and_carries_a_true_minus(value: Number | None, text: str) -> None:
    assert number(value) == text


def test_a_signed_number_says_plus_but_zero_has_no_sign() -> None:
    assert [number(value, signed=True) for value in (1.0, 0.0, -1.0)] == ["+1.00", "0", "−1.00"]


def test_decimals_are_fixed_on_request() -> None:
    assert number(1.0, decimals=3) == "1.000"
    assert [decimals_of(value) for value in (7, 0.0, 1.074, 83.4, 12345.0)] == [0, 0, 3, 2, 0]
