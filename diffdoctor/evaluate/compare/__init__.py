"""People choose one of two pictures without knowing whose it is: the page, the answers, and what they say."""
