"""Known answers for the decoders: one small image in every coding.

The image is a slanted plane, ``original``; it was encoded with libjpeg-turbo, lj92, CharLS,
OpenJPEG and OpenJPH, and for RLE with pydicom and with pylibjpeg-rle, to the same bytes. The lossy
codings may differ from it by the ``tolerance`` of their row in ``transfer_syntaxes``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = 34, 40


def original(bits: int) -> NDArray[np.int32]:
    """Return the known image, shape (34, 40), in 8 or 12 bits."""
    rows = np.arange(ROWS, dtype=np.int32)[:, None]
    columns = np.arange(COLUMNS, dtype=np.int32)[None, :]
    return rows * 3 + columns * 3 if bits == 8 else rows * 61 + columns * 49


ENCODED: Mapping[str, str] = {
    "JPEG_BASELINE": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQIBAQEBAQIBAQECAgICAgICAgIDAwQD"
        "AwMDAwICAwQDAwQEBAQEAgMFBQQEBQQEBAT/wAALCAAiACgBAREA/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAEC"
        "AwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAk"
        "M2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJ"
        "ipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3"
        "+Pn6/9oACAEBAAA/AP4p/BHgj/U/ufT+GvsDwR4I/wBT+59P4a+wPBHgj/U/ufT+GvsDwR4I/wBT+59P4a+w"
        "PBHgj/U/ufT+Gv5v/BHgj/U/ufT+GvsDwR4I/wBT+59P4a+wPBHgj/U/ufT+GvsDwR4I/wBT+59P4a+wPBHg"
        "j/U/ufT+Gv5v/BHgj/U/ufT+GvsDwR4I/wBT+59P4a+wPBHgj/U/ufT+GvsDwR4I/wBT+59P4a+wPBHgj/U/"
        "ufT+Gv5v/BHgj/U/ufT+GvsDwR4I/wBT+59P4a+wPBHgj/U/ufT+GvsDwR4I/wBT+59P4a+wPBHgj/U/ufT+"
        "Gv5gPBEcf7n92nb+EV9geCI4/wBz+7Tt/CK+wPBEcf7n92nb+EV9geCI4/3P7tO38Ir7A8ERx/uf3adv4RX/"
        "2Q=="
    ),
    "JPEG_EXTENDED": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQIBAQEBAQIBAQECAgICAgICAgIDAwQD"
        "AwMDAwICAwQDAwQEBAQEAgMFBQQEBQQEBAT/wQALDAAiACgBAREA/8QAFQABAQAAAAAAAAAAAAAAAAAADA7/"
        "xAAhEAAABAYDAQAAAAAAAAAAAAAACidGBws3VGJzBQZjRP/aAAgBAQAAPwCMByQUunpChdi3NeAYgEgpdPSF"
        "C7Fua8AxAJBS6ekKF2Lc14BiASCl09IULsW5rwDEAkFLp6QoXYtzXgJ4/JBS6ekKF2Lc14BiASCl09IULsW5"
        "rwDEAkFLp6QoXYtzXgGIBIKXT0hQuxbmvAMQCQUunpChdi3NeAnj8kFLp6QoXYtzXgGIBIKXT0hQuxbmvAMQ"
        "CQUunpChdi3NeAYgEgpdPSFC7Fua8AxAJBS6ekKF2Lc14CePyQUunpChdi3NeAYgEgpdPSFC7Fua8AxAJBS6"
        "ekKF2Lc14BiASCl09IULsW5rwDEAkFLp6QoXYtzXgJk+JBQqhekKb9C+Fn8d5+IYgEgoVQvSFN+hfCz+O8/E"
        "MQCQUKoXpCm/QvhZ/HefiGIBIKFUL0hTfoXws/jvPxDEAkFCqF6Qpv0L4Wfx3n4j/9k="
    ),
    "JPEG_LOSSLESS": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/wwALDAAiACgBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAAAAYM/9oACAEB"
        "AAQAAM//AGNjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY3oAAAAAAvQAAAAABegAAAAA"
        "C9AAAAAAF6AAAAAAL0AAAAAAXoAAAAAAvQAAAAABegAAAAAC9AAAAAAF6AAAAAAL0AAAAAAXoAAAAAAvQAAA"
        "AABegAAAAAC9AAAAAAF6AAAAAAL0AAAAAAXoAAAAAAvQAAAAABegAAAAAC9AAAAAAF6AAAAAAL0AAAAAAXoA"
        "AAAAAvQAAAAABegAAAAAC9AAAAAAF6AAAAAAL0AAAAAAXoAAAAAAvQAAAAABegAAAAAD/9k="
    ),
    "JPEG_LOSSLESS_SV1": (
        "/9j/xAAWAAEBAQAAAAAAAAAAAAAAAAAFBgz/wwALDAAiACgBABEA/9oACAEAAAYAAM//AGNjY2NjY2NjY2Nj"
        "Y2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY3r7777777777777777777777777777777777777796+++++"
        "+++++++++++++++++++++++++++++++++/evvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv3r77777777"
        "77777777777777777777777777777796++++++++++++++++++++++++++++++++++++++/evvvvvvvvvvvv"
        "vvvvvvvvvvvvvvvvvvvvvvvvvvv3r7777777777777777777777777777777777777796+++++++++++++++"
        "+++++++++++++++++++++++/evvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv3r777777777777777777"
        "7777777777777777777796++++++++++++++++++++++++++++++++++++++/evvvvvvvvvvvvvvvvvvvvvv"
        "vvvvvvvvvvvvvvvvv3r7777777777777777777777777777777777777796+++++++++++++++++++++++++"
        "+++++++++++++/evvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv3r7777777777777777777777777777"
        "777777777796++++++++++++++++++++++++++++++++++++++/evvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv"
        "vvvvvvv3r7777777777777777777777777777777777777796+++++++++++++++++++++++++++++++++++"
        "+++/evvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv3r77777777777777777777777777777777777777"
        "96++++++++++++++++++++++++++++++++++++++/evvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv3r7"
        "777777777777777777777777777777777777796++++++++++++++++++++++++++++++++++++++/evvvvv"
        "vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv3r7777777777777777777777777777777777777796++++++++"
        "++++++++++++++++++++++++++++++/evvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv3r77777777777"
        "77777777777777777777777777796++++++++++++++++++++++++++++++++++++++/evvvvvvvvvvvvvvv"
        "vvvvvvvvvvvvvvvvvvvvvvvvgP/Z"
    ),
    "JPEG_LS_LOSSLESS": (
        "/9j/9wALDAAiACgBAREA/9oACAEBAAAAAJhYWFfXVthX11bWVdVU1FPTUtJR0VDQf/33579efHft16dOfLle"
        "mJgXlxaWFZUUlBOTEpIRkRCQP3z147dOXDds1aNGbJkxYsGBicfeeeddddccccbbbbaaaaaaZZZZZYYYYXXX"
        "XXXWMCSyyyqqqqqqqqqqjGMYxjGMYta1rWta1rWpRecpSlKUpSlKUpSUqqqqqqqqqqqqqqqXBURERERERERJ"
        "JJJJJJJJJJItASSSSSSSqqqqqqqqlgAC/3//f/9//3//f6sAC/9//3//f/9//36oAC//f/9//3//f/96kAC/"
        "/3//f/9//3//agAC/3//f/9//3//f6cAC/9//3//f/9//36YAC//f/9//3//f/96UAC//3//f/9//3//aQAC"
        "/3//f/9//3//f6MAC/9//3//f/9//36IAC//f/9//3//f/96EAC//3//f/9//3//aAAC/3//f/9//3//f/4A"
        "F/9//3//f/9//3/gAL//f/9//3//f/9+gAX/f/9//3//f/9/8AAv/3//f/9//3//f2ABf/9//3//f/9//3oA"
        "C/9//3//f/9//3/IAF//f/9//3//f/9+AAL/f/9//3//f/9/7gAX/3//f/9//3//f2AAv/9//3//f/9//3qA"
        "Bf9//3//f/9//3/QAC//f/9//3//f/9+gAF//3//f/9//3//cwAL/3//f/9//3//f5D/2Q=="
    ),
    "JPEG_LS_NEAR": (
        "/9j/9wALDAAiACgBAREA/9oACAEBAAIAAJNNFNFNFNFNH6P0f9/3/d933eVpWn0+n/9rCiiSSSSSCCCCHve9"
        "7nOc4pSlKQhCEI5HdyjO7O7O7M7M7MzMzMzKzMrKyspNlGTbbbbbbbabbTabTTaaaKNpNKlKlUqpVSqlVJIV"
        "Vf9//3/SD/9//3/6QF99999990g33333332kHfffffffUg99999999APvvvvvvvQAvvvvvvvugG+++++++0A"
        "77777776gHvvvvvvv+D7777777/AX33333338G+++++++/B33333333we++++++/wPvvvvvvv4Bffffffffg"
        "b77777774HfffffffeB7777777+g+++++++9QF99999991BvvvvvvvtQd9999999UHvvvvvvvoD77777770A"
        "X3333333QG+++++++0D/2Q=="
    ),
    "JPEG_2000_LOSSLESS": (
        "/0//UQApAAAAAAAoAAAAIgAAAAAAAAAAAAAAKAAAACIAAAAAAAAAAAABCwEB/1IADAAAAAEABQQEAAH/XAAT"
        "QGBoaHBoaHBoaHBoaHBoaHD/ZAAlAAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjL/kAAKAAAA"
        "AAB0AAH/k9/gIAe3KZQNOPDfwB84OAB0IAhRXwh/wB84SAD4QwAQLkevDBV/wPwBoAfIDCc+I/f6fwDQA8B9"
        "oTAB8IhA4y3St7kvyURIpKC7wD6gmAfUGHQt4HVAl/CAYL+f4mOterAAAYPJa//Z"
    ),
    "JPEG_2000": (
        "/0//UQApAAAAAAAoAAAAIgAAAAAAAAAAAAAAKAAAACIAAAAAAAAAAAABCwEB/1IADAAAAAEABQQEAAD/XAAj"
        "QpcglvCW8JbAjwCPAI7gh1CHUIdocAVwBXBHd9N303di/2QAJQABQ3JlYXRlZCBieSBPcGVuSlBFRyB2ZXJz"
        "aW9uIDIuNS4y/5AACgAAAAAAvwAB/5PH/iASB7eCe43lZddgwB+oHAAfAEAJA7wIccA+8IgH6hIQG3E5g0ee"
        "8gwYhdKNin62iMB94jAH0jgnPtGqrMpX6ApqFhWwdYgqkxQz1XmifAaF7d4m3qDewH1icA+gcEDjN39MzQ/M"
        "t4BhHk6PBm+K0AhIpKPT3WIfCP8CNo003cAfGSgD5jB0LeCKFDRs7fEhSAYHOOJ8Nza/n+JXhLsE/3oI2AAB"
        "gpTAAYSEs8GRhFr/2Q=="
    ),
    "HTJ2K_LOSSLESS": (
        "/0//UQApQAAAAAAoAAAAIgAAAAAAAAAAAAAAKAAAACIAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgAB"
        "AAUEBEAB/1wAEyCIkJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAANQA"
        "Af+TwAArAB0A0/CJ8z/kAsM0AMAAE0AAEgD3/QALdADtCjMAwAAVEAAEwPfeAAIwAnYAu/0Dd1QAwAAV0AAF"
        "QL59fX37/tgDH9fhi3gA/3/iRknstgDAABaUAAFcWq1Wq9Vqtdrv8EI6enpxAnoA3bZt2/6BPZJ79knsugDA"
        "AC3IAAXUACAIgiAIgiAIgiAIguD8f4AiOnp6enp6enCCfwB4PB6Px+PxeDwej8fj8Xg8Hv97YBCBv3hCBv3h"
        "CBv3hCBv3hCBvrcB/9k="
    ),
    "HTJ2K": (
        "/0//UQApQAAAAAAoAAAAIgAAAAAAAAAAAAAAKAAAACIAAAAAAAAAAAABDwEB/1AACAACAAAAKv9SAAwAAgAB"
        "AAUEBEAA/1wAIyK3GLbqtuq2vK8ArwCu4qdMp0ynZJADkAOQRpfSl9KXYf9kABcAAU9wZW5KUEggVmVyIDAu"
        "MjYuMy7/kAAKAAAAAAGnAAH/k8AAAV5HO+GG/z91AZ3v/gQAtADAAAE8AAATALnN7QKLdADn8wAiNADAAAK2"
        "AAAVwLrrHnPMuov5A5lCtQDsP8G+J9h/4gBjA362AMAABdRAAAW+9naNJiDg4gI++Ox2jSaAAC66CD747JoA"
        "LoLvCgvbf/4DlB8IAFmdADIiMiIyIDIgMiAZjxmPGY8ZjxmPMz5AY4wvCEDQuwDAABdhAABdsEhEEIKC1NQQ"
        "RBCCgtTUEEQQgoLU1BBEEIKC1NQQIYjabjmn+SgeSgeSgcYVhEmQARqhERqhERqhERqhERqhEYBHgEfAA/AI"
        "eAAeAQ/AI+ABePweAIUxCAp0xCApugAEa5Na5NC0AcAAF3kAAF6a1qJIksxGkSSZjSJJMhtFkmQ2iiTJbBRJ"
        "ktkokiSzUSRJFpH+fP9ObP8lfyV/JX8lfyV/JX8lfhCvC3gBnJmZmZmZmZmZmWtVVVVVVVVVVVWhURSNolE0"
        "ikbRKBpFo2gU/QP/Y4JPfST30k99JPfST3Pk9++T375Pfvk9++T2XWtVrVa1WtVqOAL/2Q=="
    ),
    "RLE": (
        "AgAAAEAAAAB+AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
        "APsA/AH8AvwD+wT8BfwG/gf9APsB/AL8A/wE+wX8Bv0H/gD8AfsC/AP8BPwF+wb8B/8A/AH8AvsD/AT8BfwG"
        "+wcACAAA/AH8AvwD+wT8BfwG/Af+CPwB/AL8A/wE+wX8BvwH/Qj+AfsC/AP8BPwF+wb8B/wI/wH8AvsD/AT8"
        "BfwG+wf8CAAJAAH8AvwD+wT8BfwG/Af7CP8J/AL8A/wE+wX8BvwH/Aj9Cf0C/AP8BPwF+wb8B/wI/An/AvsD"
        "/AT8BfwG+wf8CPwJAAoAAvwD+wT8BfwG/Af7CPwJ/wr8A/wE+wX8BvwH/Aj7Cf4K/QP8BPwF+wb8B/wI/An8"
        "Cv4D/AT8BfwG+wf8CPwJ/AoACwAD+wT8BfwG/Af7CPwJ/Ar/C/wE+wX8BvwH/Aj7CfwK/gv9BPwF+wb8B/wI"
        "/An7Cv0L/gT8BfwG+wf8CPwJ/Ar7C/8E/AX8BvwH+wj8CfwK/Av/DPsF/Ab8B/wI+wn8CvwL/gz9BfsG/Af8"
        "CPwJ+wr8C/0M/gX8BvsH/Aj8CfwK+wv8DP8F/Ab8B/sI/An8CvwL+wwADQAF/Ab8B/wI+wn8CvwL/Az+DfwG"
        "/Af8CPwJ+wr8C/wM/Q3+BvsH/Aj8CfwK+wv8DPwN/wb8B/sI/An8CvwL+wz8DQAOAAb8B/wI+wn8CvwL/Az7"
        "Df8O/Af8CPwJ+wr8C/wM/A39Dv0H/Aj8CfwK+wv8DPwN/A7/B/sI/An8CvwL+wz8DfwOAA8AB/wI+wn8CvwL"
        "/Az7DfwO/w8nADFik8T1JleIueobTH2u3xBBcqPUBTZnmMn6K1yNvu8gUYKz5BVGdyc9bp/QATJjlMX2J1iJ"
        "uuscTX6v4BFCc6TVBjdomcr7LF2Ov/AhUoO0J3qr3A0+b6DRAjNklcb3KFmKu+wdTn+w4RJDdKXWBzhpmsv8"
        "LV6PwPEnt+gZSnus3Q4/cKHSAzRllsf4KVqLvO0eT4Cx4hNEdabXCDlqm8z9Lif0JVaHuOkaS3yt3g9AcaLT"
        "BDVml8j5KluMve4fUIGy4xRFdqfYCTprJzFik8T1JleIueobTH2u3xBBcqPUBTZnmMn6K1yNvu8gUYKz5BVG"
        "d6gnbp/QATJjlMX2J1iJuuscTX6v4BFCc6TVBjdomcr7LF2Ov/AhUoO05Ser3A0+b6DRAjNklcb3KFmKu+wd"
        "Tn+w4RJDdKXWBzhpmsv8LV6PwPEiJ+gZSnus3Q4/cKHSAzRllsf4KVqLvO0eT4Cx4hNEdabXCDlqm8z9Ll8n"
        "JVaHuOkaS3yt3g9AcaLTBDVml8j5KluMve4fUIGy4xRFdqfYCTprnCdik8T1JleIueobTH2u3xBBcqPUBTZn"
        "mMn6K1yNvu8gUYKz5BVGd6jZJ5/QATJjlMX2J1iJuuscTX6v4BFCc6TVBjdomcr7LF2Ov/AhUoO05RYn3A0+"
        "b6DRAjNklcb3KFmKu+wdTn+w4RJDdKXWBzhpmsv8LV6PwPEiUycZSnus3Q4/cKHSAzRllsf4KVqLvO0eT4Cx"
        "4hNEdabXCDlqm8z9Ll+QJ1aHuOkaS3yt3g9AcaLTBDVml8j5KluMve4fUIGy4xRFdqfYCTprnM0nk8T1JleI"
        "ueobTH2u3xBBcqPUBTZnmMn6K1yNvu8gUYKz5BVGd6jZCifQATJjlMX2J1iJuuscTX6v4BFCc6TVBjdomcr7"
        "LF2Ov/AhUoO05RZHJw0+b6DRAjNklcb3KFmKu+wdTn+w4RJDdKXWBzhpmsv8LV6PwPEiU4QnSnus3Q4/cKHS"
        "AzRllsf4KVqLvO0eT4Cx4hNEdabXCDlqm8z9Ll+QwSeHuOkaS3yt3g9AcaLTBDVml8j5KluMve4fUIGy4xRF"
        "dqfYCTprnM3+J8T1JleIueobTH2u3xBBcqPUBTZnmMn6K1yNvu8gUYKz5BVGd6jZCjsnATJjlMX2J1iJuusc"
        "TX6v4BFCc6TVBjdomcr7LF2Ov/AhUoO05RZHeCc+b6DRAjNklcb3KFmKu+wdTn+w4RJDdKXWBzhpmsv8LV6P"
        "wPEiU4S1J3us3Q4/cKHSAzRllsf4KVqLvO0eT4Cx4hNEdabXCDlqm8z9Ll+QwfInuOkaS3yt3g9AcaLTBDVm"
        "l8j5KluMve4fUIGy4xRFdqfYCTprnM3+Lyf1JleIueobTH2u3xBBcqPUBTZnmMn6K1yNvu8gUYKz5BVGd6jZ"
        "CjtsJzJjlMX2J1iJuuscTX6v4BFCc6TVBjdomcr7LF2Ov/AhUoO05RZHeKknb6DRAjNklcb3KFmKu+wdTn+w"
        "4RJDdKXWBzhpmsv8LV6PwPEiU4S15ies3Q4/cKHSAzRllsf4KVqLvO0eT4Cx4hNEdabXCDlqm8z9Ll+QwfIj"
        "J+kaS3yt3g9AcaLTBDVml8j5KluMve4fUIGy4xRFdqfYCTprnM3+L2AnJleIueobTH2u3xBBcqPUBTZnmMn6"
        "K1yNvu8gUYKz5BVGd6jZCjtsnSdjlMX2J1iJuuscTX6v4BFCc6TVBjdomcr7LF2Ov/AhUoO05RZHeKnaJ6DR"
        "AjNklcb3KFmKu+wdTn+w4RJDdKXWBzhpmsv8LV6PwPEiU4S15hcn3Q4/cKHSAzRllsf4KVqLvO0eT4Cx4hNE"
        "dabXCDlqm8z9Ll+QwfIjVA=="
    ),
}
"""Base64 of the encoded frames, by the ``known_answer`` of the rows of ``transfer_syntaxes``."""
