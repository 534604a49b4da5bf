"""The command lines: options, examples, and the console command ``amed``."""

from commands.help import show_if_asked
from runtime.installed import require_installed

show_if_asked()
require_installed()
