"""What a chat template may take."""

# Of one rendering: templates of a hundred lines take milliseconds.
SECONDS_OF_A_TEMPLATE = 20.0
# Beside the libraries: half a gigabyte is enough for a conversation of a hundred megabytes.
MOST_MEMORY = 2 << 30
# A process that nobody asks any more ends by itself.
SECONDS_UNASKED = 60.0
