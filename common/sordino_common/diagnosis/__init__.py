"""What `sordino doctor` and `sordino-agent check` have in common: findings, each with its remedy.

- `finding`       what is found, and the exit code that follows
- `files`         modes, owners, room on the disk, state databases
- `machine`       memory, clock, versions
- `certificates`  how long they are valid still
- `broker`        reach, limits, access rules, by a `transport.probe`
- `standing`      our roster against the one that the broker keeps; the other side's version
"""
