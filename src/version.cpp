#include "turboquant/version.hpp"

namespace turboquant {

// The version of the compiled library, to be compared with the headers' TQ_VERSION_STRING.
const char* version() { return TQ_VERSION_STRING; }

}  // namespace turboquant
