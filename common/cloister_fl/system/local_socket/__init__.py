"""HTTP between processes of one user, over a UNIX socket that no other account can reach.

``socket_file`` binds and finds the socket, ``socket_client`` speaks HTTP to it, ``socket_server``
answers. Secrets and authority pass between our own processes on such a socket alone: a port of
loopback can be taken by any account of the machine while its owner is away.
"""
