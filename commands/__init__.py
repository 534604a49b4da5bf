"""The command lines: options, examples, and the console command ``amed``."""
