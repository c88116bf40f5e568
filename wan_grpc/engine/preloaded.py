"""What the forkserver imports: first its tie to the server, so that it ends even while it imports the rest for ranks.

Nobody else may import it.
"""

from wan_grpc.engine.lifeline import end_with_parent

end_with_parent()

import wan_grpc.engine.worker  # noqa: E402, F401  # takes seconds
