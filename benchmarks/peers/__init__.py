"""Other people's servers, set up from PyPI and Debian packages; none of their code is here."""
