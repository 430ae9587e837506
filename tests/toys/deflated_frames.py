"""Deflated Image Frame Compression (PS3.5 section A.4.13), a transfer syntax that is not offered.

What docs/guides/add-a-transfer-syntax.md adds, in one place: in the product each part stands in the
module that its comment names. Every frame is a stream of its own (RFC 1951), so what it can inflate
to is known from the header; a whole data set that is deflated stays refused.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from cloister_fl.client.dicom.codestream import READERS, Frame
from cloister_fl.client.dicom.header import PixelLayout
from cloister_fl.client.dicom.pixels import known_answers
from cloister_fl.client.dicom.pixels.decoders import DECODERS
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.transfer_syntaxes import (
    TRANSFER_SYNTAXES,
    Family,
    TransferSyntax,
)
from cloister_fl.errors import Reject

# client.dicom.transfer_syntaxes

DEFLATE = Family("Deflate", "zlib, of Python")

ROW = TransferSyntax(
    "1.2.840.10008.1.2.8.1", "Deflated Image Frame Compression", DEFLATE, "DEFLATE",
)  # fmt: skip

# client.dicom.codestream

_PART = 1 << 16
"""Bytes that are inflated at a time, and dropped."""


def read_frame(data: bytes, _row: TransferSyntax, layout: PixelLayout) -> Frame:
    """Count what the frame inflates to: its stream does not tell its size."""
    expected = layout.rows * layout.columns * layout.bits_allocated // 8
    stream = zlib.decompressobj(wbits=-15)
    size = 0
    try:
        while not stream.eof and size <= expected:
            part = stream.decompress(data, _PART)
            if not part:
                break
            size += len(part)
            data = stream.unconsumed_tail
    except zlib.error:
        raise RejectedFile(Reject.DECODE_FAILED) from None
    if size > expected:
        raise RejectedFile(Reject.PIXEL_FORMAT)
    if size < expected or not stream.eof:
        raise RejectedFile(Reject.TRUNCATED)
    # One byte of padding is allowed (A.4.13).
    if stream.unused_data not in (b"", b"\0"):
        raise RejectedFile(Reject.DECODE_FAILED)
    return Frame(layout.rows, layout.columns, layout.bits_allocated)


# client.dicom.pixels.decoders


def decode(data: bytes, frame: Frame) -> Any:
    """Inflate a frame to the bytes of its pixels, and not one more."""
    size = frame.rows * frame.columns * frame.precision // 8
    values = zlib.decompressobj(wbits=-15).decompress(data, size)
    return np.frombuffer(values, f"<u{frame.precision // 8}").reshape(frame.rows, frame.columns)


# client.dicom.pixels.known_answers: made with libdeflate, another implementation

KNOWN_ANSWER = (
    "BcEFjFdHHgDg/5uZn868t/ilODTFoSkOzeGS4HIpDpfi0BSH5nBJcElwuRSHpjg0h0uCS4LLpTg0RZbdbY7dZYXc"
    "96VS36S+T61MnU99TFWJekULomPR26iM6WSmm33mqSliW9rxdpu9a8E1dMPdOnfF5bma0B+WwmnIgIrYHefgYXyF"
    "JakdTaG/p35M/Zy6mYqiutHgaFV0IcqOqpreZqE5bt6ZsraznWH322e2qGvlJrjt7p5DaAQjYD1chXyohQNwGZ7B"
    "TKxEPWguHaF/pX5N/Z6Ko2bRmGhzdCsypp4ZYlabiybHVLN97CJ7wr635VwXN9MdcM9dMWgNE2EH3AfCxjgSN+A1"
    "LMDaNJCW01nKov+k/kx9EXWIpkZ7osdRYpqbsWaLuW2srW+H2jX2ks211V1ft9iddOmuPHSFWXAQXkBxbIOTcCc+"
    "QKYmNIo20nUqpDr8v9RX0XfR/Oho9CYqbTqaaWaveWLSbAs7zm61d6xzDdwwt9Zddp9cDegHS+AUfIAK2A1n4yF8"
    "iSWoLU2mXfSQhJvyaP4m+j5aGZ2PPkZVTC+zwBwzb00Z28lOt/vsU1vEtXTj3TZ31wE0hOGwDq5AHtTE/rgUT2MG"
    "VqTuNIcO0ysqye14Cu/mH6Ofo5tRZOqawWaVuWCyTVXb2y60x+07W9Z1djPcfvfMFYVWMAG2wz1AbIQjcD1exXys"
    "RQNoGZ2hTKrEPXguH+HX/Gv0exSbZmaM2WxuGWPr2SF2tb1oc2w118ctcifce1cOusBMOADPoRi2xom4A+8jUWMa"
    "SRvoGhVQbR7Iy/ksZ3Fl+TP6wnQwU80e89gktrkda7fY29a6+m6oW+MuuVxXHfrCYjgJ6VAeu+IsPIgvsDi1oUm0"
    "kx4QcxMexRv5OhdyHRkkX5nvzHxz1LwxpW1HO83utU9smmvhxrmt7o5z0ACGwVq4DJ+gBvbDJXgKP2AF6kaz6RC9"
    "pBLclifzLn7IIk1ltGyS781Kc958NFVsL7vAHrNvbRnXyU13+9xTVwRawnjYBncBsCEOx3V4BfOwJvWnpXSaMqgi"
    "d+c5fJhfcUlpJ1NktzySn81NE9m6drBdZS/YbFvV9XYL3XH3zpWFzjAD9sMzKIqtcAJux3uI1IhG0Hq6SvlUiwfw"
    "Mj7DmVxJeshcOSKvpZT+bmLbzI6xm+0ta1w9N8StdhddjqsGfWARnID3UA674Ew8gM+xGLWmibSD7hNxYx7JG/ga"
    "F3BtGSjL5axkSWXtqV/YDnaq3WMf28Q1d2PdFnfbWagPQ2ENXIJcqI59cTGexHQsT11pFh2kF1Sc2/Ak3skPmKWJ"
    "jJKNcl0KpY4O0hX6nZ1vj9o3trTr6Ka5ve6JS4MWMA62wh1w2ACH4Vq8jJ+wBvWjJXSKPlAF7saz+RC/5BLSVibL"
    "Lnkook11tG7SG7rSnrcfbRXXyy1wx9xbVwY6wXTYB0+hCLbE8bgN7yJQQxpO6+gK5VFN7s9L+TRncEXpLnPksLyS"
    "ktpOp+hufaTqb9rI1XWD3Sp3wWW7qtAbFsJxeAdlsTPOwP34DItSK5pA2+keITfiEbyer3I+15IBskzOSKZU0h46"
    "V4/oay3l2/vYNXNj3GZ3yxmoB0NgNVyEHKiGfXARnsD3WI660Ew6QM+pGLfmibyD7zNJYxkpG+SaFEhtHajL9axm"
    "aWXf08/zHdxUt8c9dgk0h7GwBW6Dxfo4FNfgJczF6tSXFtNJSqfy3JVn8UF+wcWljUySnfJAWJvoKN2o17VQ6/hB"
    "foU/5+e7o+6NKw0dYRrshSeQhi1wHG7FO+ioAQ2jtXSZPlEN7sdL+BR/4ArSTWbLIXkpJbStTtZd+lDFN/Wj/SZ/"
    "w3/2591HVwV6wQI4Bm+hDHbC6bgPn2IRaknjaRvdJeCGPJzX8RXO45rSX5bKacmQitpd5+hhfaUlfTs/xe/2j7yG"
    "b0MEdWEwrIILkA1VsTcuxOP4DstSZ5pB++kZFeVWPIG38z1GaSQjZL1clXyppQN0mZ7RTK3ke/i5/oh/7UuF9uGn"
    "0AzGwGa4BQbr4RBcjRcxB6tRH1pEJ+g9leMuPJMP8HMuJq1louyQ+0LaWEfqBr2mBVrbD/TL/Vmf5SuHnmFe+C1M"
    "hT3wGBJsjmNxC95GS/VpKK2hS5RL1bkvL+aTnM7lpavMkoPyQoprG52kO/WBsm/iR/mN/rov9HXCoLAinAt/haPw"
    "BkpjR5yGe/EJplELGkdb6Q45bsDDeC1f5k9cQ/rJEjklH6SCdtPZekhfagnf1k/2u/xDL6FpGB02hRvhc/g6/ghV"
    "sBcuwGP4FstQJ5pO++gpFeGWPJ638V0GaSjDZZ1ckTypqf11qZ7WDK3ou/s5/rB/5UuGdmFK2B0eBY2/jX+I6+Jg"
    "XIUXMBurUm9aSMfpHZXlzjyD9/MzLiqtZIJsl3uC2khH6Hq9qvlayw/wy/wZn+krhR5hbjgSXodScfv4p/iXeAxu"
    "xltoqB4NodV0kXKoGvfhRXyC33M56SIz5YA8l2LaWifqDr2v5Bv7kX6Dv+YLfO0wMCwPZ0NWqBz3jOfFv8V/xHvw"
    "MSbUnMbSFrpNluvzUF7DlziXq0tfWSwnJV3Ka1edpQf1hRb3bfwkv9M/8ByahFFhY7geCkOdeFC8Ij4X/xV/mbzB"
    "0tSRptFeekJp3ILH8Va+w04ayDBZK5flk9TQfrpET+kHreC7+dn+kH/pS4S2YXLYFR4GiZvGo+NN8Y34c/x18s+k"
    "CvWiBXSM3lIZ7sTTeR8/5SLSUsbLNrkroA11uK7TK5qnNX1/v9Sf9hm+Yuge5oTD4VUoGbeLp8S740exJt8mPyT/"
    "TgbTKrpA2VSVe/NCPs7vuKx0lhmyX55JUW2lE3S73lP0jfwIv95f9fm+VhgQloUzITNUinvEc+Mj8eu4VNI++Sn5"
    "JflvsplukeF6PIRX80XO4WrSRxbJCXkv5bSLztQD+lyL+dZ+ot/h73sKjcPIsCFcCwWhdjwwXh6fjbPiyknPZF7y"
    "W/JH8re0x5Rwcx7LW/g2W6kvQ2WNXJJcqa59dbGe1HQt77v6Wf6gf+GLhzZhUtgZHgSOm8Sj4o3x9bgwrpMMSlYk"
    "55K/ki/T/pH2fw=="
)

# Where the product has them, and a toy puts them for as long as a test runs

PARTS: tuple[tuple[Any, Any, Any], ...] = (
    (TRANSFER_SYNTAXES, ROW.uid, ROW),
    (READERS, DEFLATE, read_frame),
    (DECODERS, DEFLATE, decode),
    (known_answers.ENCODED, ROW.known_answer, KNOWN_ANSWER),
)
"""Table, key and value of each part."""
