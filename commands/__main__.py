"""``python -m commands`` is the console command ``amed``."""

from commands.app import main

if __name__ == "__main__":
    main()
