"""The command lines: options, examples, and the console command ``amed``."""

from runtime.installed import require_installed

require_installed()
