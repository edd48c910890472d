#include "server/process_metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

#include "server/gateway_metrics.h"

namespace lorikeet {
namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;

double ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  double pages = 0, resident = 0;
  statm >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

double CpuSeconds() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  const auto seconds = [](const timeval& t) { return t.tv_sec + t.tv_usec / 1e6; };
  return seconds(use.ru_utime) + seconds(use.ru_stime);
}

double OpenFiles() {
  std::error_code error;
  const std::filesystem::directory_iterator files("/proc/self/fd", error);
  if (error) return 0;
  return static_cast<double>(std::distance(begin(files), end(files)));
}

double MostOpenFiles() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  return static_cast<double>(limit.rlim_cur);
}

MetricFamily One(const char* name, const char* help, MetricType type, double value) {
  MetricFamily family = MakeFamily(name, help, type);
  AddSample(&family, {}, value);
  return family;
}

}  // namespace

std::vector<MetricFamily> ProcessFamilies() {
  return {One("process_cpu_seconds_total", "CPU time", MetricType::Counter, CpuSeconds()),
          One("process_resident_memory_bytes", "Resident memory", MetricType::Gauge,
              ResidentBytes()),
          One("process_open_fds", "Open files", MetricType::Gauge, OpenFiles()),
          One("process_max_fds", "Files that may be open", MetricType::Gauge, MostOpenFiles())};
}

}  // namespace lorikeet
