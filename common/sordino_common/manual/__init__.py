"""What a program's own parser knows, for shells and for readers: completion and manual pages, from one description.

- `tree`        commands, options and arguments as values; each program fills it from its parser
- `completion`  scripts for bash, zsh and fish, which start no Python when somebody presses TAB
- `groff`       manual pages (man(7))
"""
