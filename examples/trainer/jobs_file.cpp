#include "examples/trainer/jobs_file.h"

#include <graft/core/error.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

namespace graft::trainer {
namespace {

using nlohmann::json;

constexpr const char* kArea = "jobs";

// What holds for the whole run.
const std::set<std::string> kRunFlags = {"model",
                                         "device",
                                         "dtype",
                                         "threads",
                                         "quiet",
                                         "verbose",
                                         "json",
                                         "jobs",
                                         "help",
                                         "jobs-per-pass",
                                         "dry-run",
                                         "log-every",
                                         "gradient-checkpointing",
                                         "cuda-graph"};

std::vector<json> entries_of(const std::string& path) {
  const std::string text = read_file(path, kArea);
  std::vector<json> entries;
  const auto parse = [&](const std::string& piece, const std::string& place) {
    json value = json::parse(piece, nullptr, /*allow_exceptions=*/false);
    GRAFT_CHECK(!value.is_discarded(), kArea, "the file must be JSON; got what is none (", place,
                ")");
    return value;
  };
  if (path.ends_with(".jsonl")) {
    std::stringstream stream(text);
    int64_t number = 0;
    for (std::string line; std::getline(stream, line);) {
      ++number;
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      entries.push_back(parse(line, concat("line ", number, " of '", path, "'")));
    }
  } else {
    const json all = parse(text, "file '" + path + "'");
    GRAFT_CHECK(all.is_array(), kArea, "the file must hold an array of objects; got ",
                all.type_name(), " (file '", path, "')");
    entries.assign(all.begin(), all.end());
  }
  GRAFT_CHECK(!entries.empty(), kArea, "the file must hold a job; got none (file '", path, "')");
  return entries;
}

// The words of a command line that say the same as "key": value.
std::vector<std::string> words_of(const std::string& flag, const json& value) {
  const auto word = [&](const json& v) {
    GRAFT_CHECK(v.is_string() || v.is_number() || v.is_boolean(), kArea, "the value of '", flag,
                "' must be text, a number, true or false, or a list of these; got ", v.dump());
    return v.is_string() ? v.get<std::string>() : v.dump();
  };
  if (!value.is_array()) return {"--" + flag + "=" + word(value)};
  std::vector<std::string> words;
  std::string list;
  for (const json& item : value) {
    words.push_back("--" + flag + "=" + word(item));
    list += (list.empty() ? "" : ",") + word(item);
  }
  if (flag == "set") return words;  // the one flag that may be repeated
  return {"--" + flag + "=" + list};
}

FinetuneOptions read_job(const json& entry, const FinetuneOptions& shared) {
  GRAFT_CHECK(entry.is_object(), kArea, "a job must be an object; got ", entry.dump());
  FinetuneOptions job = shared;
  job.jobs.clear();
  CLI::App app;
  add_finetune_flags(app, job);
  std::vector<std::string> words = {"--model=" + shared.common.model};
  for (const auto& [key, value] : entry.items()) {
    std::string flag = key;
    std::replace(flag.begin(), flag.end(), '_', '-');
    GRAFT_CHECK(!kRunFlags.contains(flag), kArea, "'", key,
                "' holds for all jobs and belongs on the command line");
    GRAFT_CHECK(app.get_option_no_throw("--" + flag) != nullptr, kArea,
                "a job's keys must be flags of finetune; got '", key, "'");
    if (flag == "epochs") job.steps.reset();  // the command line's --steps would win
    for (auto& word : words_of(flag, value)) words.push_back(std::move(word));
  }
  std::reverse(words.begin(), words.end());  // as CLI11 takes them
  try {
    app.parse(words);
  } catch (const CLI::ParseError& error) {
    fail(kArea, error.what());
  }
  GRAFT_CHECK(!job.data.empty() && !job.output.empty(), kArea, "a job must have ",
              job.data.empty() ? "data" : "an output", "; got none");
  job.validate();
  return job;
}

}  // namespace

std::vector<FinetuneOptions> read_jobs(const FinetuneOptions& shared) {
  const auto entries = entries_of(shared.jobs);
  std::vector<FinetuneOptions> jobs;
  std::map<std::string, size_t> outputs;  // folder -> entry
  for (size_t i = 0; i < entries.size(); ++i) {
    try {
      jobs.push_back(read_job(entries[i], shared));
      const std::string folder =
          std::filesystem::weakly_canonical(std::filesystem::path(jobs.back().output) / "x")
              .parent_path();
      const auto [it, fresh] = outputs.emplace(folder, i + 1);
      GRAFT_CHECK(fresh, kArea, "every job must have an output of its own; got '",
                  jobs.back().output, "' as entry ", it->second, " has");
    } catch (const Error& error) {
      throw Error(concat(error.what(), " (entry ", i + 1, " of '", shared.jobs, "')"));
    }
  }
  return jobs;
}

}  // namespace graft::trainer
