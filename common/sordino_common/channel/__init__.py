"""Keys, rosters and sessions: who may speak to whom, and that nobody else reads or changes it.

- `identity`    device and operator keys, signatures
- `roster`      who belongs to the fleet, signed by the operator
- `handshake`   `SessionTable`: from two names to a session (the essay is there)
- `session`     an established session; `effects`, `packets`, `slots`: what the table says, reads and remembers
- `presence`    signed births and deaths
- `sealed_box`  one message to one receiver, without a session
- `boot`        how often this device has started
"""
