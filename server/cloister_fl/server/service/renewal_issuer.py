"""Process that issues renewed certificates of sites, and ends.

Run as ``python -m cloister_fl.server.service.renewal_issuer DIR`` by ``supervisor`` when a site's
renewal waits. It is the only one beside the commands that opens the authority's private key; it has
no port, and what it certifies was judged before and stands in the database.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cloister_fl.errors import CloisterError
from cloister_fl.server.coordinator.folder import open_coordinator
from cloister_fl.server.coordinator.site_renewal import issue_renewals
from cloister_fl.system.child_process import child, tell, tell_failed

if __name__ == "__main__":
    with child():
        try:
            for name in issue_renewals(open_coordinator(Path(sys.argv[1]))):
                tell("renewed", site=name)
        except CloisterError as error:
            tell_failed(error)
            sys.exit(error.exit_status)
