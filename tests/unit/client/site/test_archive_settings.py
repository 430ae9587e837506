"""What a person writes about the archive in ``site.toml``."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.client.site.folder import init_site, open_site
from cloister_fl.errors import (
    SiteFileInvalid,
)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('[data.dicomweb]\nurl = "http://pacs.example/dicom-web"', "http on this machine alone"),
        ('[data.dicomweb]\nurl = "https://u:p@pacs.example/"', "no place for a query"),
        ('[data.dicomweb]\nurl = "https://"', "must be https"),
        ('[data.dicomweb]\nurl = "https://a/"\nauth = "basic"', "is needed for auth = 'basic'"),
        ('[data.dicomweb]\nurl = "https://a/"\nurll = "x"', "url"),
        ('[data.cget]\nhost = "pacs"\ncalled = "PACS"\ntls = false', "on this machine alone"),
        ('[data.cget]\nhost = "pacs"\ncalled = "A TITLE THAT IS TOO LONG"', "called"),
        ('[data.cget]\nhost = "pacs"\ncalled = "P"\ncertificate = "c.pem"', "is needed with"),
        ('[data.query]\nstudy_date = "yesterday"', "must be a day"),
        (
            '[data.dicomweb]\nurl = "https://a/"\n[data.cget]\nhost = "b"\ncalled = "P"',
            "name one archive",
        ),
    ],
)
def test_faults_of_the_site_file_are_named(tmp_path: Path, table: str, told: str) -> None:
    site = init_site(tmp_path / "site", name="north")
    text = (site.root / "site.toml").read_text()
    (site.root / "site.toml").write_text(text.replace("[network]", f"{table}\n\n[network]"))
    with pytest.raises(SiteFileInvalid, match="line") as caught:
        open_site(site.root)
    assert told in str(caught.value)
