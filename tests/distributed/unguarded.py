"""A script that does not guard launch."""

import launched

launched.launch(launched.report, 2)
