// Progress goes to standard output; standard error is for the one line of a failure.
#pragma once

#include <string>

namespace lorikeet {

void Say(const std::string& line);  // any thread

}  // namespace lorikeet
