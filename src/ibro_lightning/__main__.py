"""``python -m ibro_lightning fit --config quickstart.yaml``"""

from ibro_lightning.cli import main

if __name__ == "__main__":
    main()
