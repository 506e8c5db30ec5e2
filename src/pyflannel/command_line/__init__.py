"""The command line: what there is to type, and what was typed.

Tables: `flags` (of the daemon), `usage` (sub-commands, and `--help`). Made of them: `options`
(the daemon's flags and variables as one value), `arguments` (of sub-commands), `manual`,
`completion` with `completion_fish` and `completion_zsh`.
"""
