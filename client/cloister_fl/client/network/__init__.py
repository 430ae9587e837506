"""Connection to the coordinator: HTTPS requests, proxy, joining a federation."""
