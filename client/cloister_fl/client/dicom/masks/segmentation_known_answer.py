"""Known-answer segmentation: two slices of 6 x 5 pixels of a CT series, and two segments.

A worker reads it before its first file, for two reasons: what is wrong with the library is known
before a patient is marked wrongly, and what the library loads when first used is loaded by then.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np

from cloister_fl.client.dicom.mask_table import Mask

SEGMENT = "right"
SLICES = ("2.25.100", "2.25.101")

_FILE = (
    "eNrtF01vG0X0eWMsKw1hk4YoqqpqUjiEqlnNzK73o0Iojm0RI38sXrsoKAK8ziZZKfGa9VqoFz564oQaVHEON34C4o"
    "D4EfyAHjly4lh4M7txShsELYRKiLXsefPmzfv+WAM836darzQVXHuNPHyPqwI5aG+KFZ+cgmuvfhWYxjXboBqjlNpa"
    "SWOagV+mmaZmKDCDNDeAaxwPSiXLZrZjOhbSG7xkGLbNDd0u6TYzS5Q6toM8Vbyx9BhXsWN4tohn19Izbmp4qummTa"
    "mha45mGbouBCtwGbwtFQ7C/YPdcBAdUY3bGidFKELFU6Fa69Rv16o7bqfeLHe2Eb8I1XIROOUmY1wv4v1ucx6oXbKo"
    "qekOCrCQavlPrS3CylNaWwSCsgHXVx7TgaIOAq+fq4uLFhagXKmsu6wIH6BdefBqb+LJCBrtArQiP9q9U4R74LYEl3"
    "tqo51H7DAowssL3tsAX2EIH/4KD74Acf6WxCUZjkucu9CrX/lDezlS9JCimFlL6TPfZATm0W+FdG9hPFafpzYqZqDw"
    "moqxabQVcBFDZZRU2EBPA0YZVHHCyAqQKZQ7EVr/nGn9k5QtonEdtk4zkUSjYLg+jibxICCDaJjEoT9JonicRmj2LG"
    "czzgVIk3cFlJNqd3maH1k+OA63mZA9c+J1NfCiveSjfhyQw9CP+/EdMhkHuySJyCAO+klAkoNwTMLhOOkPUf4GjL4W"
    "Gr+RaWxKjSEnMotRh1FeBAV3eahWmphZ+VyjvQRuHA2C8Tgc7pPah5NwdBQMEwIvnsXPTKN5WgXUMilnpqmbzOLMKR"
    "mWwy3LxodazLJ1ZhgWQc96W4D+XoC6p4BDCNaggBhCnTPeNoEN9IqgXP1S6O5muuNlxO0e9+ob53YHRrUSw61mcMNC"
    "iYaDgvWSY+uiSCnFsFuOzXTTtHUC1yVvNZfyvvuP8g6Oy908+HAJee5n8Kyw536jfQU6wV4QBxidXeIF+9K3rcmRH8"
    "REaPLxBWhCgE81Qa8fp5osQ/2ovx8QNxqHSRgNidtPQtRmTfR8T8yBNchjLcxBs91qV7Y67WaNkzXMHxE1HSFV0hWQ"
    "bkFCLyAEudO7uSmkSAgQmplC6moFIUp9pKh4Bdist7BR+yhbxOVuFpdvkdbH+SJwm1ke3Jrm8CyIMtEtdAw5zWOv0p"
    "3mcXnYT6KjcNA/JOMkngySSRz4aFOql4/6io55GOwlvpwbBWiWW71yw4eXpMRbv+tOQiL2asekKNB+Ut48NCZYMVNJ"
    "4uZ3F6a/kulfgBj7SUIuwgIfK1REqdUewaeSe6X7Po6gEXwGokJdrNyKh/lQrbW69e42dF6TVbWXSX1P5vLyscBdzX"
    "BLEmdBFfOK7VD5wVVkk6S7kdFdB9GDXaRLO+/nCOWxIgQlTeEdHCodKiX+mE9v3c8JO1+VnB5mnH6Rtqfz5psMd/JM"
    "82YN3r0spvB2zZt21tsZx9ajnZUznZ/TWW9i95ZjIZSFtxfFGTQ6a7g4PeK+LEec4tI2M5OgPSqB6dh0n5QwB1lLSV"
    "nAgvTESsZBlb5/57jXKGL+p+94oh8ImtczGkPiOHr4Jqwzjt2Gnj476zZOqul+B1/FpmdUdDjBZzHjMysz/1JWaxce"
    "G/Zfio2IS+5vxsb4i7FR/q+bp47Nv1U3Cjz4RJX/xuYQ+8PKDP6Orok/Zr8BwSbcwA=="
)


def file() -> bytes:
    """The file, written by highdicom."""
    return zlib.decompress(base64.b64decode(_FILE))


def masks() -> dict[str, Mask]:
    """What ``SEGMENT`` marks, by slice."""
    first, second = np.zeros((6, 5), np.uint8), np.zeros((6, 5), np.uint8)
    first[0, 0] = 1
    second[4:, 2:] = 1
    return dict(zip(SLICES, (first, second), strict=True))
