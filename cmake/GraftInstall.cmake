# `cmake --install`: afterwards find_package(graft CONFIG) gives graft::graft. Nothing that is installed names a folder
# of the machine it was built on.
include(CMakePackageConfigHelpers)
set(GRAFT_PACKAGE_DIR "${CMAKE_INSTALL_LIBDIR}/cmake/graft")

install(TARGETS graft EXPORT graftTargets)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/graft" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.h")
install(FILES "${PROJECT_BINARY_DIR}/include/graft/version.h" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/graft")
install(EXPORT graftTargets NAMESPACE graft:: DESTINATION "${GRAFT_PACKAGE_DIR}")

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/graftConfig.cmake.in" graftConfig.cmake
                              INSTALL_DESTINATION "${GRAFT_PACKAGE_DIR}" NO_SET_AND_CHECK_MACRO)
# While the version is 0.x, each minor version may change the interface.
write_basic_package_version_file(graftConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/graftConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/graftConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindLibTorch.cmake"
        DESTINATION "${GRAFT_PACKAGE_DIR}")
